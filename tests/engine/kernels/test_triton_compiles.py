"""A compiler for the GPU takes the Triton kernels: what the interpreter runs may still be no program. Needs no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.zygote import ROOT

triton = pytest.importorskip("triton", reason="triton is not installed")
if not (Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas").exists():
    pytest.skip("this triton carries no assembler for GPUs", allow_module_level=True)

SHARED = 227 * 1024
"""Bytes of shared memory that a block may have on an H100."""
HARDEST = ("planes-bf16-16x128/8", "sparse-bf16-16-False", "fused-bf16-128-True", "merge-bf16-True-True-True")
EVERY_KERNEL = (
    *("stage-bf16", "fold-bf16", "lists-bf16-True", "lists-bf16-True-odd", "sparse-bf16-1-True-one"),
    *("count_ones", "find_ones", "unpack_bits", "rice_indices", "set_ones", "make_planes"),
)


def compiled(*names: str) -> Any:
    """In a process of its own: this one may have been told to interpret. Results are kept, by their source."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(ROOT / ".cache" / "triton")
    command = [sys.executable, "-m", "tests.engine.kernels.compile_gpu", *names]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_every_kernel_compiles_for_hopper() -> None:
    report = compiled(*HARDEST, *EVERY_KERNEL)
    assert all(made["cubin"] and made["shared"] <= SHARED for made in report.values()), report
    assert not any(made["spilled"] for made in report.values()), report
    on_tensor_cores = {name for name, made in report.items() if made["wgmma"]}
    assert on_tensor_cores == {"planes-bf16-16x128/8", "fused-bf16-128-True"}


@pytest.mark.slow
def test_every_variant_compiles_for_hopper() -> None:
    report = compiled(*compiled())
    assert all(made["cubin"] and made["shared"] <= SHARED for made in report.values()), report
    sixteen_bits = {name: made for name, made in report.items() if "-fp32-" not in name and not name.endswith("-one")}
    assert not {name for name, made in sixteen_bits.items() if made["spilled"]}
