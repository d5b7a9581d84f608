"""The benchmark of merges chooses strengths on rows that it does not score, and goes on where it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import bars, merging
from bench.first_table import Kept
from bench.merging import STRENGTHS, Tasks, bars_of, static_row
from store.merge_methods import Method

ROWS = [{"prompt": str(number), "answer": "x"} for number in range(200)]


class FakeOffline:
    """Does best at half the strength where it is chosen, and at full strength where it is scored."""

    def __init__(self) -> None:
        self.loaded: list[float] = []
        self.seen: list[list[str]] = []

    def load_expert(self, file: Path, weight: float) -> None:
        self.loaded.append(weight)

    def score(self, task: Any, rows: list[dict[str, str]]) -> float:
        self.seen.append([row["prompt"] for row in rows])
        at_the_end = int(rows[0]["prompt"]) >= 100
        return 1 - abs(self.loaded[-1] - (0.5 if at_the_end else 1.0))


@pytest.fixture(autouse=True)
def _rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merging, "load_rows", lambda task, part: ROWS)


def tasks_of(offline: FakeOffline, folder: Path) -> Tasks:
    return Tasks(["cron", "spam"], 100, 20, offline, Kept(folder / "scores.json"))  # type: ignore[arg-type]


def test_a_strength_is_chosen_on_rows_that_are_not_scored(tmp_path: Path) -> None:
    offline, file = FakeOffline(), tmp_path / "merged"
    file.write_bytes(b"x")
    row = static_row(Method.TIES, file, tasks_of(offline, tmp_path), offline)  # type: ignore[arg-type]
    assert (row["strength"], row["mean"], row["cron"]) == (0.5, 0.5, 0.5)
    scored, chosen = [str(number) for number in range(100)], [str(number) for number in range(180, 200)]
    assert offline.seen.count(scored) == 2
    assert offline.seen.count(chosen) == 2 * len(STRENGTHS[Method.TIES])
    assert len(offline.loaded) == len(STRENGTHS[Method.TIES]) + 1, "once for all tasks"


def test_what_was_scored_is_not_scored_again(tmp_path: Path) -> None:
    file = tmp_path / "merged"
    file.write_bytes(b"x")
    first, second = FakeOffline(), FakeOffline()
    rows = [
        static_row(Method.RAM, file, tasks_of(offline, tmp_path), offline)  # type: ignore[arg-type]
        for offline in (first, second)
    ]
    assert rows[0] == rows[1]
    assert not second.seen
    file.write_bytes(b"another merge")
    static_row(Method.RAM, file, tasks_of(second, tmp_path), second)  # type: ignore[arg-type]
    assert second.seen


def test_routing_is_held_against_the_best_merge() -> None:
    rows = [
        {"experts": "merged: ties", "mean": 0.4},
        {"experts": "merged: atlas", "mean": 0.7},
        {"experts": "served, by name", "mean": 0.9},
        {"experts": "served, model: auto", "mean": 0.81},
    ]
    routed, oracle = bars_of(rows)
    assert routed["value"] == pytest.approx(0.11)
    assert oracle["value"] == pytest.approx(0.9)
    assert [routed["met"], oracle["met"]] == [True, False]


def test_the_page_shows_what_was_measured_or_that_nothing_was(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bars, "RESULTS", tmp_path)
    assert "Not measured yet" in bars.merging_table()
    rows = [
        {"experts": "none: the base", "cron": 0.0, "spam": 0.5, "mean": 0.25},
        {"experts": "merged: ties", "strength": 1.5, "cron": 0.25, "spam": 1.0, "mean": 0.625},
    ]
    (tmp_path / "merging.json").write_text(json.dumps({"rows": rows}))
    assert bars.merging_table().splitlines() == [
        "| four experts | strength | cron | spam | mean |",
        "|---|---|---|---|---|",
        "| none: the base |  | 0.00 | 0.50 | 0.25 |",
        "| merged: ties | 1.5 | 0.25 | 1.00 | 0.62 |",
    ]


def test_every_method_is_tried() -> None:
    assert set(STRENGTHS) == set(Method)
