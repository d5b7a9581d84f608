"""Both ways to search points give the same neighbours at the same distances."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import SimpleNamespace

import faiss
import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from router.nearest import FaissNearest, Nearest, nearest_of
from router.nearest_torch import TorchNearest, _stream_of


def both(points: npt.NDArray[np.float32]) -> list[Nearest]:
    return [FaissNearest(points), TorchNearest(points, "cpu")]


@given(st.integers(0, 60), st.integers(1, 9), st.integers(0, 70), st.integers(1, 4), st.integers(0, 1 << 30))
@settings(deadline=None, max_examples=150)
def test_neighbours_and_distances_are_those_of_plain_arithmetic_ties_included(
    count: int, width: int, wanted: int, spread: int, seed: int
) -> None:
    """Whole numbers within so narrow a spread are often equally far, and exactly."""
    rng = np.random.default_rng(seed)
    points = rng.integers(-spread, spread + 1, size=(count, width)).astype(np.float32)
    query = rng.integers(-spread, spread + 1, size=width).astype(np.float32)
    squares = np.square(points - query).sum(axis=1)
    expected = np.sort(squares)[:wanted]
    for way in both(points):
        rows, distances = way.search(query, wanted)
        assert (rows.dtype, distances.dtype) == (np.int64, np.float32)
        assert len(rows) == len(distances) == len(set(rows.tolist())) == min(wanted, count)
        assert np.array_equal(squares[rows], expected), "nearest first, nobody nearer left out"
        assert np.allclose(distances, np.sqrt(expected), rtol=1e-6)
        ties = squares[rows][1:] == squares[rows][:-1]
        assert (rows[1:] > rows[:-1])[ties].all(), "equally far ones in the order of their numbers"


@given(st.integers(1, 200), st.integers(1, 70), st.integers(1, 220), st.integers(0, 1 << 30))
@settings(deadline=None, max_examples=60)
def test_both_ways_agree_on_points_anywhere(count: int, width: int, wanted: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    points = (rng.normal(size=(count, width)) * 10 ** rng.uniform(-3, 3)).astype(np.float32)
    query = (points[rng.integers(count)] + rng.normal(size=width) * 0.1).astype(np.float32)
    (_, first), (rows, second) = (way.search(query, wanted) for way in both(points))
    assert np.allclose(first, second, rtol=1e-4, atol=1e-6)
    assert np.allclose(np.linalg.norm(points[rows] - query, axis=1), second, rtol=1e-4, atol=1e-6)


def test_what_is_there_decides_who_searches(monkeypatch: pytest.MonkeyPatch) -> None:
    points = np.zeros((3, 2), dtype=np.float32)
    made: list[str] = []

    class Noted(TorchNearest):
        def __init__(self, points: npt.NDArray[np.float32], device: str) -> None:
            made.append(device)
            super().__init__(points, "cpu")

    monkeypatch.setattr("router.nearest_torch.TorchNearest", Noted)
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 0)
    assert isinstance(nearest_of(points), FaissNearest)
    assert isinstance(nearest_of(points, "cuda:1"), Noted)
    assert made == ["cuda:1"]


def test_all_snapshots_search_on_one_stream_and_on_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams of steps have another priority, so that none of them is ever the same."""
    drawn, within = [], []

    def stream(device: torch.device, priority: int) -> SimpleNamespace:
        drawn.append((device, priority))
        return SimpleNamespace(device=device)

    def entering(what: str) -> Callable[[object], AbstractContextManager[None]]:
        @contextmanager
        def enter(value: object) -> Iterator[None]:
            within.append((what, value))
            yield

        return enter

    monkeypatch.setattr("router.nearest_torch._streams", {})
    monkeypatch.setattr(torch.cuda, "Stream", stream)
    monkeypatch.setattr(torch.cuda, "device", entering("device"))
    monkeypatch.setattr(torch.cuda, "stream", entering("stream"))
    second = torch.device("cuda:1")
    for _ in range(40):
        found = _stream_of(second)
    assert drawn == [(second, -1)]
    nearest = TorchNearest(np.zeros((3, 2), dtype=np.float32), "cpu")
    nearest._stream = found
    nearest.search(np.zeros(2, dtype=np.float32), 1)
    assert within == [("device", second), ("stream", found)]


@pytest.mark.gpu
def test_a_gpu_finds_what_the_cpu_finds_whatever_else_is_queued_there() -> None:
    rng = np.random.default_rng(0)
    points = rng.normal(size=(5000, 64)).astype(np.float32)
    there, here = TorchNearest(points, "cuda"), FaissNearest(points)
    busy = torch.randn(2048, 2048, device="cuda")
    for query in rng.normal(size=(20, 64)).astype(np.float32):
        busy = busy @ busy.T / 2048
        (rows, distances), (wanted, expected) = there.search(query, 128), here.search(query, 128)
        assert np.allclose(distances, expected, rtol=1e-5)
        assert len(set(rows.tolist()) & set(wanted.tolist())) >= 127
