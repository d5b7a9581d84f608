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
ON_TENSOR_CORES = {"add_bytes bf16 8 128 8 8 3 4", "fused_product bf16 128 128 2 8 1 3 8"}
EVERY_KERNEL = {
    *ON_TENSOR_CORES,
    *(
        "add_planes fp32 16 64 4 8 3 4",
        "split_rows bf16 8 1024",
        "add_lists bf16 4096 32 16 1 0 4",
        "add_sparse bf16 16 8 32 0 1 4",
        "stage_rows bf16 16 128",
        "fold_rows bf16 16 2",
        "absorb bf16 1024",
    ),
    *("merge_tiles bf16 32 4 1 0 1 0", "merge_lists bf16 8 512 32 1 0", "merge_lists bf16 8 512 32 1 0 odd"),
    *("count_ones int 1024", "find_ones int 32", "unpack_bits int 1024", "rice_indices int 1024", "set_ones int 1024"),
    *("make_planes int 4",),
}
"""At least one variant of each."""


def run(module: str, *arguments: str) -> Any:
    """In a process of its own: this one may have been told to interpret. What it compiles is kept, by its source."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(ROOT / ".cache" / "triton")
    command = [sys.executable, "-m", f"tests.engine.kernels.{module}", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_every_kernel_compiles_for_hopper() -> None:
    known = run("compile_gpu")
    assert {name.split()[0] for name in known} == {name.split()[0] for name in EVERY_KERNEL}
    report = run("compile_gpu", *EVERY_KERNEL)
    assert all(made["cubin"] and made["shared"] <= SHARED for made in report.values()), report
    assert not any(made["spilled"] for made in report.values()), report
    assert {name for name, made in report.items() if made["wgmma"]} == ON_TENSOR_CORES


@pytest.mark.slow
def test_every_variant_compiles_for_hopper() -> None:
    report = run("compile_gpu", *run("compile_gpu"))
    assert all(made["cubin"] and made["shared"] <= SHARED for made in report.values()), report
    for name, made in report.items():
        if "fp32" not in name and not name.endswith(("odd", "=1")):
            assert made["spilled"] <= 16, name
            assert made["wgmma"] == name.startswith(("add_bytes", "fused_product")), name


def test_what_a_server_compiles_when_it_starts_is_all_that_launches_need() -> None:
    report = run("prepare_gpu")
    assert all(kernel["launches"] and kernel["compiled"] for kernel in report.values()), report
    assert not any(kernel["again"] for kernel in report.values()), report
