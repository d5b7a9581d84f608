"""Compiles the attention of decode steps for a GPU that need not be there: `python -m tests.engine.compile_attention`.

Prints one JSON object. `variants`: for each its shared memory in bytes, the bytes of registers that it has to spill
into memory, how many copies of 16 bytes and how many of fewer it makes into shared memory, and whether it uses tensor
cores. `again`: how many variants launches compile that the comparison at start has not. Must run without
TRITON_INTERPRET.
"""

from __future__ import annotations

import json
import re
from itertools import product
from typing import Any

import torch
import triton
from triton.compiler import ASTSource
from triton.runtime import driver

from server.engine import gpu_attention
from server.engine.attention import Decodes
from server.engine.kv_cache import BLOCK_TOKENS
from server.engine.paged_kernels import attends_rightly, writes_rightly
from tests.engine.kernels.compile_gpu import HOPPER, spilled
from tests.engine.kernels.prepare_gpu import Absent, Unlaunched, compiled

KERNELS = ("attend_splits", "store_rows")
SIZES = [
    (torch.bfloat16, 32, 8, 128, True),
    (torch.bfloat16, 32, 4, 64, False),
    (torch.float16, 32, 32, 128, False),
    (torch.float16, 9, 3, 64, True),
]
"""Type, query heads, key heads, numbers of a head, whether scores are capped."""
INTEGERS = {"table_ptr": "*i64", "lengths_ptr": "*i64", "arrived_ptr": "*i32"}
FLOATS = {"sums_ptr": "*fp32", "peaks_ptr": "*fp32", "scale": "fp32", "cap": "fp32"}


def variant(dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int, capped: bool) -> dict[str, Any]:
    kernel, constants = gpu_attention.attend_splits, gpu_attention.fixed(dtype, kv_heads, heads, head_dim, capped)
    options = {name: value for name, value in constants.items() if name not in kernel.arg_names}
    signature, attributes, places = {}, {}, {}
    for place, parameter in enumerate(kernel.params):
        name, pointer = parameter.name, parameter.name.endswith("_ptr")
        if name in constants:
            signature[name] = "constexpr"
            places[(place,)] = constants[name]
            continue
        own = {torch.bfloat16: "*bf16", torch.float16: "*fp16"}[dtype] if pointer else "i32"
        signature[name] = (INTEGERS | FLOATS).get(name, own)
        if pointer and not parameter.do_not_specialize:
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=places, attrs=attributes)
    made = triton.compile(source, target=HOPPER, options=options)
    ptx = made.asm["ptx"]
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global [^,]+, [^,]+, (\w+)", ptx)
    return {
        "shared": made.metadata.shared,
        "spilled": spilled(ptx),
        "wide copies": sum(int(size, 0) == 16 for size in copies),
        "narrow copies": sum(int(size, 0) != 16 for size in copies),
        "mma": "mma.sync" in ptx,
    }


def compiled_again() -> dict[str, int]:
    """Of launches on tensors whose addresses and strides are as odd as a step's may be, after the start's."""
    driver.set_active(Absent())
    kernels = {name: getattr(gpu_attention, name) for name in KERNELS}
    for name, kernel in kernels.items():
        setattr(gpu_attention, name, Unlaunched(kernel))
    kv_heads, heads, head_dim, like = 3, 9, 64, torch.zeros(1, dtype=torch.bfloat16)
    attend = gpu_attention.attends(132)

    def capped(*given: Any) -> torch.Tensor:
        return attend(*given[:-1], 2.0)

    for first in (attend, capped):
        # Nothing is computed, so the first case is told to be wrong and ends the comparison.
        attends_rightly(first, kv_heads, heads, head_dim, like)
    writes_rightly(gpu_attention.store, kv_heads, head_dim, like)
    before = {name: compiled(kernel) for name, kernel in kernels.items()}
    for rows, width in product((1, 3, 16), (1, 16, 33, 128)):
        numbers = torch.zeros(rows * (2 + width), dtype=torch.int64)
        slots, lengths, table = numbers[:rows], numbers[rows : 2 * rows], numbers[2 * rows :].view(rows, width)
        projected = torch.zeros(rows, heads + 2 * kv_heads, head_dim, dtype=like.dtype).transpose(0, 1)
        query, key, value = projected.split([heads, kv_heads, kv_heads])
        keys, values = torch.zeros(2, 4, BLOCK_TOKENS, kv_heads, head_dim, dtype=like.dtype)
        gpu_attention.store(keys, values, key, value, slots)
        for window, softcap in product((None, 16), (None, 50.0)):
            for one in (query, query.contiguous()):
                attend(one, keys, values, Decodes(table, lengths), 1.0, window, softcap)
    return {name: compiled(kernel) - before[name] if before[name] else -1 for name, kernel in kernels.items()}


def main() -> None:
    variants = {str(sizes): variant(*sizes) for sizes in SIZES}
    print(json.dumps({"variants": variants, "again": compiled_again()}))  # noqa: T201


if __name__ == "__main__":
    main()
