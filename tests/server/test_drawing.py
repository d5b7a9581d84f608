"""The report of routing on the screen, and its map: a real picture, in which nothing covers anything."""

from __future__ import annotations

import builtins
import io
import random
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from server.drawing import draw_map, print_matrix
from store.errors import MissingPackageError, SwitchyardError

image = pytest.importorskip("matplotlib.image")


def report(count: int, *, recent: int = 50, wrong: int = 0) -> dict[str, Any]:
    """Experts around points of a circle."""
    draw = random.Random(count)
    experts = []
    for i in range(count):
        at = draw.uniform(-3, 3), draw.uniform(-3, 3)
        routed = [0] * count
        routed[i], routed[(i + 1) % count] = 40 - wrong - 1, wrong
        experts.append(
            {
                "id": f"expert-{i}-{'x' * i}"[:40],
                "digest": f"{i:064}",
                "recent_requests": i,
                "centres": [[at[0] + draw.gauss(0, 0.3), at[1] + draw.gauss(0, 0.3)] for _ in range(20)],
                "routed_to": routed,
                "routed_to_others": 0,
                "routed_to_base": 1,
            }
        )
    seen = [
        {"x": draw.uniform(-3, 3), "y": draw.uniform(-3, 3), "id": experts[i % count]["id"] if i % 3 else None}
        for i in range(recent)
    ]
    return {
        "object": "route.report",
        "method": "leave-one-out: [as it is]",
        "experts": experts,
        "left_out": 7,
        "axes": [0.4321, 0.21],
        "background": [[draw.gauss(0, 2), draw.gauss(0, 2)] for _ in range(140)],
        "recent": [*seen, {"x": 1e3, "y": 0.0, "id": None}],
    }


def printed(given: dict[str, Any], width: int = 100) -> str:
    out = Console(file=io.StringIO(), width=width)
    print_matrix(given, out)
    said: str = out.file.getvalue()  # type: ignore[attr-defined]
    return said


def test_a_matrix_where_there_is_room() -> None:
    said = printed(report(3, wrong=4))
    lines = [line.split() for line in said.splitlines()]
    assert lines[0] == ["expert", "1", "2", "3", "other", "base"]
    assert lines[1] == ["1", "expert-0-", "35", "4", "·", "·", "1"]
    assert lines[3] == ["3", "expert-2-xx", "4", "·", "35", "·", "1"]
    assert "105 of 120 exemplars find their own expert (87.5%); 7 more experts are not shown" in said
    assert "[as it is]" in said


def test_the_worst_where_there_is_none() -> None:
    said = printed(report(30, wrong=4), width=150)
    line = next(line for line in said.splitlines() if line.startswith("expert-1-x "))
    assert line.split() == ["expert-1-x", "88%", "2%", "10%", "expert-2-xx", "10%"]
    assert len(said.splitlines()) == 1 + 30 + 2


def test_without_experts() -> None:
    nothing = report(1, recent=0) | {"experts": [], "background": [], "recent": []}
    assert "nothing to confuse" in printed(nothing)


@pytest.mark.parametrize("count", [1, 8, 40])
def test_the_map_is_a_picture(tmp_path: Path, count: int) -> None:
    path = tmp_path / "map.png"
    draw_map(report(count), path)
    pixels = image.imread(path)
    assert pixels.shape[0] > 800
    assert pixels.shape[1] > pixels.shape[0]
    colours = {tuple(row) for row in (pixels[::3, ::3, :3] * 15).round().reshape(-1, 3).tolist()}
    assert len(colours) > min(count, 20) + 2, "each expert has its own colour"


def test_a_map_of_nothing(tmp_path: Path) -> None:
    nothing = report(1, recent=0) | {"experts": [], "background": [], "recent": []}
    draw_map(nothing, tmp_path / "map.png")
    assert (tmp_path / "map.png").stat().st_size > 1000


def test_faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SwitchyardError, match="cannot write"):
        draw_map(report(2), tmp_path / "none" / "map.png")
    load = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return load(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingPackageError, match=r"switchyard\[plots\]"):
        draw_map(report(2), tmp_path / "map.png")
