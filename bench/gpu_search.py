"""Prompts among the centres of many experts: PyTorch's search on the card, next to the floor of reading them all."""

from __future__ import annotations

import statistics
from functools import partial

import numpy as np

from bench.gpu_lab import Lab, Work
from bench.report import Row
from router.nearest_torch import TorchNearest

_CENTRES = 20
_RANK = 64
_FOUND = 128
_EXPERTS = (100, 1000, 10000)


def search_rows(lab: Lab) -> list[Row]:
    """Time of one search as a request waits for it, the way to the card and back included."""
    rng = np.random.default_rng(0)
    found: list[Row] = []
    for experts in _EXPERTS if lab.on_gpu else _EXPERTS[:1]:
        points = rng.normal(size=(experts * _CENTRES, _RANK)).astype(np.float32)
        nearest = TorchNearest(points, str(lab.device))
        queries = rng.normal(size=(8, _RANK)).astype(np.float32)
        # What is wrong would be fast for nothing.
        rows, distances = nearest.search(queries[0], _FOUND)
        plain = np.linalg.norm(points - queries[0], axis=1)
        if not np.allclose(np.sort(plain)[:_FOUND], distances, rtol=1e-4):
            raise ValueError(f"a search among {len(points)} centres did not find the nearest")
        calls: list[Work] = [partial(nearest.search, query, _FOUND) for query in queries]
        seconds = statistics.median(lab.wall_seconds({"": calls})[""])
        floor = lab.floor(points.nbytes)
        found.append({"what": "search", "experts": experts, "centres": len(points), "rank": _RANK, "found": len(rows),
                      "µs": 1e6 * seconds, "floor µs": 1e6 * floor, "× floor": seconds / floor})  # fmt: skip
    return found
