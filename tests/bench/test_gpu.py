"""The GPU benchmark goes through all its lines on a CPU, on a machine that has little more than PyTorch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from bench import gpu_kernels
from bench.gpu import Run
from bench.gpu_lab import DRY, Lab, turned
from bench.report import RESULTS, ROOT, Bar, Row, show
from server.engine.kernels import backend
from tests.engine.conftest import Library
from tests.tiny import save_base

ABSENT = (
    "faiss fastapi gguf httptools llguidance multipart opentelemetry prometheus_client pydantic pydantic_core "
    "pydantic_settings redis rich starlette typer uvicorn uvloop"
)
"""What a bare machine with PyTorch, Triton and transformers does not have."""

BARE = f"""
import runpy, sys
sys.modules.update(dict.fromkeys({ABSENT!r}.split()))
runpy.run_module("bench.gpu", run_name="__main__")
"""


def test_the_gpu_benchmark_runs_dry_where_there_is_no_web_stack(tmp_path: Path) -> None:
    library = Library(save_base(tmp_path / "base"), tmp_path / "experts")
    library.folder.mkdir()
    for seed in (1, 2):
        library.add(seed)
    before = sorted(RESULTS.iterdir())
    arguments = ["--dry-run", "--base", library.base, "--experts", library.folder, "--out", tmp_path / "out"]
    done = subprocess.run(
        [sys.executable, "-c", BARE, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Error" not in done.stderr
    (path,) = (tmp_path / "out").iterdir()
    result = json.loads(path.read_text(encoding="utf-8"))
    assert len({row["section"] for row in result["rows"]}) == 18, "the card and seventeen sections"
    assert {bar["id"].rpartition(".0.")[0] or bar["id"] for bar in result["bars"]} == {
        *("gpu.one_expert", "gpu.eight_experts", "gpu.thirty_two", "gpu.thirty_two_sparse", "gpu.switch"),
        *("gpu.registered", "gpu.cold", "gpu.resident", "gpu.end_to_end"),
    }
    (real,) = [row for row in result["rows"] if row.get("mode") == "mixed"]
    assert real["tokens as on the CPU"] == 1.0
    assert sorted(RESULTS.iterdir()) == before, "a dry run proves nothing"


def test_every_input_set_has_its_turn_before_one_comes_again() -> None:
    """However many there are: so many are queued, and the next timing goes on with the next ones."""
    seen: list[int] = []
    works = turned([partial(seen.append, number) for number in range(150)], 13)
    assert len(works) == 64
    for _ in range(5):
        for work in works:
            work()
    assert seen == [*range(64, 150), *(number % 150 for number in range(5 * 64))]
    seen.clear()
    few = turned([partial(seen.append, number) for number in range(2)], 5)
    for work in few:
        work()
    assert seen == [0, 1, 0, 1, 0]


def test_what_there_was_no_time_for_is_said_by_name() -> None:
    lab = Lab(torch.device("cpu"), DRY, 60.0)
    run = Run(lab)

    def rows() -> tuple[list[Row], list[Bar]]:
        lab._ends = 0.0
        return gpu_kernels.linear_rows(lab, backend("reference", torch.device("cpu"))), []

    run.section("mixed", rows)
    assert run.rows == []
    shapes = [f"{name} at density {density}" for name in ("q", "k", "gate", "down") for density in DRY.densities]
    assert run.failures == [f"mixed: no time for {'; '.join(shapes)}"]
    run.section("merged", lambda: ([], []))
    assert run.failures[1:] == ["merged: left out, there was no time"]


def test_a_table_is_printed_without_rich_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "rich.console", None)
    show([{"what": "copy", "ms": 1.5}, {"what": "a longer name"}], title="times")
    assert capsys.readouterr().out == "times\nwhat            ms\ncopy           1.5\na longer name     \n"
