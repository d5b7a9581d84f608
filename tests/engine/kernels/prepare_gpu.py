"""Does what a server does to compile the Triton kernels when it starts, for a GPU that is not there, and then what it
does to launch them, on the CPU's tensors, without launching: `python -m tests.engine.kernels.prepare_gpu`.

Prints one JSON object: for each kernel how many variants were compiled at the start, how many more for its launches,
and how many launches there were. Must run without TRITON_INTERPRET.
"""

from __future__ import annotations

import itertools
import json
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from server.engine.kernels import Group, gpu, gpu_moving, pack
from server.engine.kernels.gpu_variants import every
from tests.engine.kernels.builders import sparse_delta

CPU = torch.device("cpu")
LAUNCHED = {
    gpu: ("add_bytes", "split_rows", "add_lists", "add_sparse", "stage_rows", "absorb", "fold_rows", "fused_product"),
    gpu_moving: ("merge_tiles", "merge_lists"),
}


class Absent:
    """A driver for one H100 that is not there: enough of one to compile."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


class Unlaunched:
    """A kernel that is compiled as for a launch, and no more."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.launches = 0

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        self.launches += 1
        return lambda *given, **fixed: self.kernel.warmup(*given, grid=grid, **fixed)


def launch_everything(kernels: gpu.TritonKernels, dtype: torch.dtype) -> None:
    """On shapes whose sizes are multiples of 16, as a model's are, with any number of rows."""
    for (out, width), (density, top), rows in itertools.product(
        ((64, 1024), (4096, 256)), ((0.02, 1), (0.02, 3), (0.3, 1), (0.3, 4)), (1, 3, 16, 48, 130)
    ):
        term = (0.5, pack(sparse_delta(1, (out, width), density, top=top), CPU))
        x, y = torch.zeros(rows, width, dtype=dtype), torch.zeros(rows, out, dtype=dtype)
        weight, bias = torch.zeros(out, width, dtype=dtype), torch.zeros(out, dtype=dtype)
        for terms in ((term,), (term, term)):
            kernels.add_linear(y, x, [Group(0, rows, terms)])
            kernels.absorb(y, torch.zeros_like(y))
            if density > 0.1:
                kernels.merge(torch.empty_like(weight), weight, terms)
        kernels.fused_linear(y, x, weight, None, [Group(0, rows, (term,))])
        kernels.fused_linear(y, x, weight, bias, [Group(0, rows, (term,))])


def compiled(kernel: Any) -> int:
    cache, *_ = kernel.device_caches[0]
    return len(cache)


def main() -> None:
    driver.set_active(Absent())
    for variant in every(torch.bfloat16):
        variant.compile()
    watched = {name: Unlaunched(getattr(home, name)) for home, names in LAUNCHED.items() for name in names}
    before = {name: compiled(unlaunched.kernel) for name, unlaunched in watched.items()}
    for home, names in LAUNCHED.items():
        for name in names:
            setattr(home, name, watched[name])
    launch_everything(gpu.TritonKernels(), torch.bfloat16)
    report = {
        name: {
            "compiled": before[name],
            "again": compiled(unlaunched.kernel) - before[name],
            "launches": unlaunched.launches,
        }
        for name, unlaunched in watched.items()
    }
    print(json.dumps(report))  # noqa: T201


if __name__ == "__main__":
    main()
