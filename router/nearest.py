"""The nearest of many points, exactly: faiss, on a GPU where it was built for one, or PyTorch on the engine's GPU."""

from __future__ import annotations

import threading
from contextlib import nullcontext
from typing import Any, Protocol

import faiss
import numpy as np
import numpy.typing as npt

Found = tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]
"""Numbers of points, and how far these are; both `[k]`."""

_GPU_SCRATCH_BYTES = 64 << 20


class Nearest(Protocol):
    """A fixed set of points. May be searched from several threads."""

    def search(self, query: npt.NDArray[np.float32], count: int) -> Found:
        """The `count` nearest points to `[r]`, or all if there are fewer, by Euclidean distance, nearest first.

        Of points equally far the one with the lower number comes first; which of them are left out where the list ends
        among them is not said.
        """
        ...


def nearest_of(points: npt.NDArray[np.float32], device: str = "cpu") -> Nearest:
    """What searches `[n, r]` points: faiss on a GPU if it was built for one, else PyTorch if the device is a GPU, else
    faiss.

    Args:
        device: the engine's.
    """
    if faiss.get_num_gpus() == 0 and device.startswith("cuda"):
        from router.nearest_torch import TorchNearest  # elsewhere the router needs no torch

        return TorchNearest(points, device)
    return FaissNearest(points)


class FaissNearest:
    """An exact index of faiss's, on the first GPU if this faiss was built for one."""

    def __init__(self, points: npt.NDArray[np.float32]) -> None:
        self._count = len(points)
        self._index: Any = faiss.IndexFlatL2(points.shape[1])
        self._index.add(np.ascontiguousarray(points))
        # faiss's GPU indexes share their scratch memory among searches.
        self._exclusive = threading.Lock() if faiss.get_num_gpus() else nullcontext()
        if faiss.get_num_gpus():
            resources = faiss.StandardGpuResources()
            resources.setTempMemory(_GPU_SCRATCH_BYTES)  # the default of 1.5 GiB belongs to the engine
            self._index = faiss.index_cpu_to_gpu(resources, 0, self._index)

    def search(self, query: npt.NDArray[np.float32], count: int) -> Found:
        """See `Nearest.search`."""
        if min(count, self._count) < 1:  # faiss refuses to look for nothing
            return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.float32)
        faiss.omp_set_num_threads(1)  # the engine's threads are busy, and one search is too small to share
        with self._exclusive:
            squares, ids = self._index.search(query[None], min(count, self._count))
        rows, distances = ids[0], np.sqrt(np.maximum(squares[0], 0))
        order = np.lexsort((rows, distances))
        return rows[order], distances[order]
