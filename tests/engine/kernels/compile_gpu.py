"""Compiles the Triton kernels for a GPU that need not be there: `python -m tests.engine.kernels.compile_gpu NAME ...`.

Prints one JSON object: for each variant its shared memory in bytes, the bytes of registers that it has to spill into
memory, and whether it uses Hopper's tensor cores.
Without names, what variants there are. Must run without TRITON_INTERPRET.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from server.engine.kernels import gpu_beside, gpu_fused, gpu_merge, gpu_transcode
from server.engine.kernels.gpu import SPARSE_SHAPES, UNFUSED, planes_shape
from server.engine.kernels.gpu_tables import PLANES_TILES

PTXAS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
HOPPER = GPUTarget("cuda", 90, 32)
_DTYPES = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}
_TORCH = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_TABLES = {"chunk_ptr": "*i64", "term_ptr": "*i64", "partial_ptr": "*fp32", "arrived_ptr": "*i32", "first_row": "i32"}
_WORDS = ("words_ptr", "counts_ptr", "upto_ptr", "found_ptr", "values_ptr", "sums_ptr", "indices_ptr")
_TYPES = _TABLES | dict.fromkeys((*_WORDS, "planes_ptr", "mask_ptr", "signs_ptr"), "*i32")


@dataclass(frozen=True)
class Variant:
    """One kernel as it is launched: its constants, the type of its other pointers, and the compiler's options.

    Attributes:
        aligned: whether sizes are multiples of 16, as a model's are; else nothing is known of them.
        ones: sizes that are 1, which are made constants.
    """

    kernel: Any
    constants: dict[str, Any]
    dtype: str = "bf16"
    options: dict[str, Any] = field(default_factory=dict)
    aligned: bool = True
    ones: tuple[str, ...] = ()

    def compile(self) -> Any:
        constants = self.constants | dict.fromkeys(self.ones, 1)
        signature, attributes = {}, {}
        for place, name in enumerate(self.kernel.arg_names):
            pointer = name.endswith("_ptr")
            kind = _TYPES.get(name, f"*{self.dtype}" if pointer else "i32")
            signature[name] = "constexpr" if name in constants else kind
            if name not in constants and (pointer or (self.aligned and name in ("out", "width", "columns"))):
                attributes[(place,)] = [["tt.divisibility", 16]]
        places = {(self.kernel.arg_names.index(name),): value for name, value in constants.items()}
        source = ASTSource(self.kernel, signature, constexprs=places, attrs=attributes)
        return triton.compile(source, target=HOPPER, options=self.options)


def variants() -> dict[str, Variant]:
    """Every variant that `TritonKernels` launches, by name, and some with sizes that no model has."""
    found: dict[str, Variant] = {}
    for dtype, dot in _DTYPES.items():
        for tile in PLANES_TILES:
            for wide, warps in sorted({planes_shape(_TORCH[dtype], tile, out) for out in (64, 4096)}):
                for splits in (1, 2, 8):
                    constants = {"M": tile, "N": wide, "J": 4, "SPLITS": splits, "DOT": dot, "STAGES": 3}
                    name = f"planes-{dtype}-{tile}x{wide}/{splits}"
                    found[name] = Variant(gpu_beside.add_planes, constants, dtype, {"num_warps": warps})
        for tile, (lists, entries) in SPARSE_SHAPES.items():
            for one in (True, False):
                constants = {"M": tile, "N": lists, "E": entries, "STAGED": tile == 16, "ONE": one, "LEVELS": not one}
                found[f"sparse-{dtype}-{tile}-{one}"] = Variant(gpu_beside.add_sparse, constants, dtype)
        found[f"stage-{dtype}"] = Variant(gpu_beside.stage_rows, {"M": 16, "COLUMNS": 128}, dtype)
        found[f"fold-{dtype}"] = Variant(gpu_fused.fold_rows, {"M": 16, "J": 2}, dtype)
        for bias in (False, True):
            for tile in (64,) if dtype == "fp32" else (128, 256):
                constants = {"M": tile, "N": 64 if tile == 64 else 128, "J": 2, "BAND": 8, "BIAS": bias, "DOT": dot}
                constants["STAGES"] = 2 if dtype == "fp32" else 3
                options = {"num_warps": 8}
                found[f"fused-{dtype}-{tile}-{bias}"] = Variant(gpu_fused.fused_product, constants, dtype, options)
        for planes, dense, many in ((True, False, False), (True, True, True), (False, True, False)):
            constants = {"R": 32, "C": 4, "PLANES": planes, "DENSE": dense, "MANY": many}
            name = f"merge-{dtype}-{planes}-{dense}-{many}"
            found[name] = Variant(gpu_merge.merge_tiles, constants, dtype, UNFUSED)
        for copy in (True, False):
            constants = {"L": 8, "COLUMNS": 512, "E": 32, "COPY": copy}
            found[f"lists-{dtype}-{copy}"] = Variant(gpu_merge.merge_lists, constants, dtype, UNFUSED)
    for name in ("planes-bf16-16x128/1", "sparse-bf16-1-True", "fused-bf16-128-True", "lists-bf16-True"):
        odd = found[name]
        found[f"{name}-odd"] = Variant(odd.kernel, odd.constants, "bf16", odd.options, aligned=False)
        found[f"{name}-one"] = Variant(odd.kernel, odd.constants, "bf16", odd.options, aligned=False, ones=("width",))
    tile = {"TILE": 1024}
    for name in ("count_ones", "unpack_bits", "rice_indices", "set_ones"):
        found[name] = Variant(getattr(gpu_transcode, name), tile)
    found["find_ones"] = Variant(gpu_transcode.find_ones, {"WORDS": 32})
    found["make_planes"] = Variant(gpu_transcode.make_planes, {"C": 4})
    return found


def spilled(ptx: str) -> int:
    """Bytes that a kernel stores for want of registers, as the assembler counts them."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx, encoding="utf-8")
        command = [PTXAS, "-v", "--gpu-name=sm_90a", "-o", Path(folder) / "kernel.cubin", source]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return sum(map(int, re.findall(r"(\d+) bytes spill stores", said)))


def main() -> None:
    known = variants()
    if len(sys.argv) == 1:
        print(json.dumps(list(known)))  # noqa: T201
        return
    report = {}
    for name in sys.argv[1:]:
        made = known[name].compile()
        report[name] = {
            "cubin": len(made.asm["cubin"]),
            "shared": made.metadata.shared,
            "spilled": spilled(made.asm["ptx"]),
            "wgmma": "wgmma.mma_async" in made.asm["ptx"],
        }
    print(json.dumps(report))  # noqa: T201


if __name__ == "__main__":
    main()
