"""Compiles what norms, gates and rotary embeddings launch for one H100 that need not be there, and launches nothing:
`python -m tests.engine.compile_elementwise`.

Prints one JSON object: for each kernel and size how many programs many launches needed, and of these the bytes of
registers that spill and the multiply-adds. Must run without TRITON_INTERPRET.
"""

from __future__ import annotations

import itertools
import json
from typing import Any

import torch
from triton.runtime import driver

from server.engine import gpu_elementwise
from server.engine.gpu_elementwise import NORM_FORMS, gate_into, norm_into, rotate_into
from tests.engine.kernels.compile_gpu import spilled
from tests.engine.kernels.prepare_gpu import Absent

WIDTHS = (128, 4096, 16384)
HEAD_DIMS = (64, 256)
DTYPES = (torch.bfloat16, torch.float32)


class Compiled:
    """A kernel that is compiled as for a launch, and no more."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.launches = 0
        self.programs: dict[str, str] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*given: Any, **fixed: Any) -> None:
            self.launches += 1
            made = self.kernel.warmup(*given, grid=grid, **fixed)
            self.programs[made.hash] = made.asm["ptx"]

        return launch

    def report(self) -> dict[str, Any]:
        programs = self.programs.values()
        return {
            "launches": self.launches,
            "programs": len(programs),
            "spilled": sum(map(spilled, programs)),
            "multiply-adds": sum(program.count("fma.rn.f32") for program in programs),
        }


def norms(width: int, dtype: torch.dtype) -> None:
    """Of layers and of heads, of any number of rows, with one weight and with one for each row."""
    for rows in (1, 2, 17):
        layer, heads = torch.zeros(1, rows, width, dtype=dtype), torch.zeros(1, rows, 8, width, dtype=dtype)
        for x, form in itertools.product((layer, heads, heads.transpose(1, 2)), NORM_FORMS[:2]):
            per_row = torch.zeros(rows, width, dtype=dtype)
            moved = per_row[:, None] if x is heads else per_row
            for weight in (torch.zeros(width, dtype=dtype), moved):
                norm_into(torch.empty_like(x), x, weight.expand_as(x), 1e-5, form)


def rotations(head_dim: int, dtype: torch.dtype) -> None:
    for rows, key_heads in itertools.product((1, 2, 17), (1, 8)):
        q, k = (torch.zeros(1, rows, heads, head_dim, dtype=dtype).transpose(1, 2) for heads in (32, key_heads))
        cos, sin = (torch.zeros(1, rows, head_dim, dtype=dtype) for _ in range(2))
        rotate_into(torch.empty_like(q), torch.empty_like(k), q, k, cos, sin)


def gates(width: int, dtype: torch.dtype) -> None:
    for rows in (1, 3):
        gate, up = (torch.zeros(1, rows, width, dtype=dtype) for _ in range(2))
        gate_into(torch.empty_like(gate), gate, up)


def main() -> None:
    driver.set_active(Absent())
    report = {}
    kernels = (
        ("norm_rows", WIDTHS, norms),
        ("rotate_heads", HEAD_DIMS, rotations),
        ("gate_numbers", WIDTHS[1:2], gates),
    )
    for name, sizes, launch in kernels:
        kernel = getattr(gpu_elementwise, name)
        for size, dtype in itertools.product(sizes, DTYPES):
            watched = Compiled(kernel)
            setattr(gpu_elementwise, name, watched)
            launch(size, dtype)
            report[f"{name} {size} {str(dtype).removeprefix('torch.')}"] = watched.report()
    print(json.dumps(report))  # noqa: T201


if __name__ == "__main__":
    main()
