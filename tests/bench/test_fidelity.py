"""The benchmark of codecs goes on after a kill, never mixes what differs, and reports what there is."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest

from bench.fidelity import Kept, earlier, measure_all
from bench.fidelity_cells import BASE, TUNED, Cell, cells
from bench.fidelity_report import FLEX, MISSING, bars_of, draw, retention, rows_of, smallest_of

TASKS = ["cron", "spam"]
SCORES = {"base": 0.1, "fine-tune": 0.9}


class Killed(BaseException):
    """As a signal would, it passes by every handler of errors."""


class FakeBench:
    def __init__(self, lives: float = math.inf, identity: str = "one") -> None:
        self.measured: list[Cell] = []
        self._lives, self._identity = lives, identity

    def identity(self, cell: Cell) -> str:
        return self._identity

    def measure(self, cell: Cell) -> dict[str, Any]:
        if len(self.measured) >= self._lives:
            raise Killed
        self.measured.append(cell)
        size = {"bits_per_param": cell.size, "bytes": 1, "times_smaller": 2.0}
        figures = size | {"cpu_seconds": 1.0} if cell.size else {}
        return (
            {"task": cell.task, "method": cell.method.name, "size": cell.size, "kl": 0.1, "rows": 200}
            | figures
            | {"score": SCORES.get(cell.method.name, 0.5)}
        )


def test_a_killed_run_is_continued_where_it_was(tmp_path: Path) -> None:
    wanted, kept = cells(TASKS)[:9], Kept(tmp_path)
    first = FakeBench(lives=4)
    with pytest.raises(Killed):
        measure_all(first, kept, wanted, math.inf)
    second = FakeBench()
    measure_all(second, kept, wanted, math.inf)
    assert first.measured + second.measured == wanted
    third = FakeBench()
    measure_all(third, kept, wanted, math.inf)
    assert not third.measured
    for cell in wanted:
        found = kept.find(cell, "one")
        assert found is not None
        assert found.get("bits_per_param") == (8.0 if cell.size else None), "half of bf16, header and all"


def test_what_a_kill_leaves_half_written_is_measured_again(tmp_path: Path) -> None:
    cell = cells(TASKS)[0]
    (tmp_path / f"{cell.key}.tmp").write_text('{"score": 0.')
    bench = FakeBench()
    measure_all(bench, Kept(tmp_path), [cell], math.inf)
    assert bench.measured == [cell]
    assert json.loads((tmp_path / f"{cell.key}.json").read_text())["score"] == 0.9


def test_measurements_of_another_fine_tune_do_not_count(tmp_path: Path) -> None:
    wanted = cells(TASKS)[:2]
    measure_all(FakeBench(), Kept(tmp_path), wanted, math.inf)
    other = FakeBench(identity="two")
    measure_all(other, Kept(tmp_path), wanted, math.inf)
    assert other.measured == wanted


def test_it_stops_in_time(tmp_path: Path) -> None:
    bench = FakeBench()
    measure_all(bench, Kept(tmp_path), cells(TASKS), time.monotonic() - 1)
    assert not bench.measured


def test_the_names_of_files_differ() -> None:
    keys = [cell.key for cell in cells(TASKS)]
    assert len(set(keys)) == len(keys)


def test_the_report_is_of_what_is_there(tmp_path: Path) -> None:
    wanted = cells(TASKS)
    flex = next(cell for cell in wanted if cell.method.name == FLEX and cell.task == "cron")
    found = {cell: FakeBench().measure(cell) for cell in (flex, Cell("cron", BASE, 0.0), Cell("cron", TUNED, 0.0))}
    assert retention(flex, found) == pytest.approx(0.5)
    row = next(row for row in rows_of(wanted, found) if row["method"] == FLEX and row["size"] == flex.size)
    assert (row["tasks"], row["prompts"], row["cron"], row["spam"]) == (1, 200, 0.5, MISSING)
    assert not bars_of(wanted, found)  # not before all tasks are measured
    everything = {cell: FakeBench().measure(cell) for cell in wanted}
    bars = {bar["id"]: bar for bar in bars_of(wanted, everything)}
    assert bars[f"fidelity.{FLEX}.0.04"]["value"] == pytest.approx(0.5)
    assert not bars[f"fidelity.{FLEX}.0.04"]["met"]
    assert not smallest_of(wanted, everything)
    everything[flex] |= {"score": 0.895}
    (smallest,) = smallest_of(wanted, everything)
    assert (smallest["task"], smallest["method"], smallest["faithful_at"]) == ("cron", FLEX, flex.size)
    draw(rows_of(wanted, found), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_what_an_earlier_run_measured_stays_in_the_report(tmp_path: Path) -> None:
    wanted = cells(TASKS)
    flex = next(cell for cell in wanted if cell.method.name == FLEX and cell.task == "cron")
    ends = [cell for cell in wanted if cell.task == "cron" and cell.method in (BASE, TUNED)]
    named = [
        {"task": "cron", "method": cell.method.name, "size": cell.size, "identity": "old"} for cell in (flex, *ends)
    ]
    rows = [FakeBench().measure(cell) | name for cell, name in zip([flex, *ends], named, strict=True)]
    said = {"date": "2026-11-01", "commit": "abcdef0123", "machine": {"cpu": "another"}, "rows": [{"size": 1}, *rows]}
    path = tmp_path / "fidelity.json"
    assert not earlier(path, wanted)
    path.write_text(json.dumps(said))
    before = earlier(path, wanted)
    assert before.keys() == {flex, *ends}
    # The fine-tune is trained again and scores otherwise; the expert of the old one is not compared with it.
    found = before | {Cell("cron", TUNED, 0.0): {"score": 1.0, "rows": 100}}
    assert retention(flex, found) == pytest.approx(0.5)
    row = next(row for row in rows_of(wanted, found) if row["method"] == FLEX and row["size"] == flex.size)
    assert row["runs"] == ["abcdef0"]
    # And so it is after the report has been written anew.
    path.write_text(json.dumps({**said, "commit": "1234567", "rows": list(found.values())}))
    assert earlier(path, wanted)[flex] == before[flex]
