"""Compiles the Triton kernels for a GPU that need not be there: `python -m tests.engine.kernels.compile_gpu NAME ...`.

Prints one JSON object: for each variant its shared memory in bytes, the bytes of registers that it has to spill into
memory, and whether it uses Hopper's tensor cores. Without names, what variants there are. Must run without
TRITON_INTERPRET.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from server.engine.kernels.gpu_bytes import add_bytes
from server.engine.kernels.gpu_variants import Variant, every

PTXAS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
HOPPER = GPUTarget("cuda", 90, 32)
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_WHOLE = {"*i8": torch.int8, "*i32": torch.int32, "*i64": torch.int64}
_TYPES = {"*" + name: dtype for name, dtype in _DTYPES.items()} | _WHOLE
_POINTERS = {dtype: name for name, dtype in _TYPES.items()}


@dataclass(frozen=True)
class Sizes:
    """A variant, and what is known of the sizes that it is given.

    Attributes:
        aligned: whether they are multiples of 16, as a model's are; else nothing is known of them.
        one: a size that is 1, which is made a constant.
    """

    variant: Variant
    aligned: bool = True
    one: str | None = None

    def compile(self) -> Any:
        variant, kernel = self.variant, self.variant.kernel
        constants = {name: value for name, value in variant.fixed.items() if name in kernel.arg_names}
        options = {name: value for name, value in variant.fixed.items() if name not in kernel.arg_names}
        constants |= {} if self.one is None else {self.one: 1}
        constants |= {"terms": 1} if variant.single and "terms" in kernel.arg_names else {}
        constants |= dict.fromkeys(variant.absent)
        signature, attributes = {}, {}
        for place, parameter in enumerate(kernel.params):
            name, pointer = parameter.name, parameter.name.endswith("_ptr")
            if name in constants:
                signature[name] = "constexpr"
                continue
            signature[name] = _POINTERS[variant.pointer(name)] if pointer else "i32"
            if pointer or (self.aligned and name != "terms" and not parameter.do_not_specialize):
                attributes[(place,)] = [["tt.divisibility", 16]]
        places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
        source = ASTSource(kernel, signature, constexprs=places, attrs=attributes)
        return triton.compile(source, target=HOPPER, options=options)


def variants() -> dict[str, Sizes]:
    """Every variant that a server compiles when it starts, by name, and some with sizes that no model has."""
    found: dict[str, Sizes] = {}
    for short, dtype in _DTYPES.items():
        for variant in every(dtype):
            own = short if dtype is variant.dtype else "int"
            numbers = [str(int(value)) for value in variant.fixed.values() if isinstance(value, int)]
            name = " ".join([variant.kernel.__name__, own, *numbers, *([] if variant.single else ["several"])])
            found[name] = Sizes(variant)
            if own == "bf16" and not name.endswith("several"):
                found[f"{name} odd"] = Sizes(variant, aligned=False)
                for one in {"width", "out"} & set(variant.kernel.arg_names):
                    if (variant.kernel, one) != (add_bytes, "width"):
                        found[f"{name} {one}=1"] = Sizes(variant, aligned=False, one=one)
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
