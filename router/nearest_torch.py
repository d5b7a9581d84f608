"""The nearest of many points on the engine's GPU, where faiss was not built for one: PyTorch's distances and top-k."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch

_streams: dict[torch.device, torch.cuda.Stream] = {}
_drawing = threading.Lock()


def _stream_of(device: torch.device) -> torch.cuda.Stream:
    """The stream of all searches on a GPU: behind what the engine has queued a prompt would wait for a whole step.

    torch hands out the same 32 in turns, so that one drawn for every snapshot would come to be the one on which the
    engine captures a step, whose capture would fail. This one is drawn once, and of the streams that go first, among
    which there is none of a step.
    """
    with _drawing:
        if device not in _streams:
            _streams[device] = torch.cuda.Stream(device, -1)  # type: ignore[no-untyped-call]
        return _streams[device]


class TorchNearest:
    """`router.nearest.Nearest` by comparing a prompt with every point; on a GPU on a stream of its own."""

    def __init__(self, points: npt.NDArray[np.float32], device: str) -> None:
        """Args:
        points: `[n, r]`.
        """
        self._device = torch.device(device)
        self._stream = _stream_of(self._device) if self._device.type == "cuda" else None
        with self._own_stream():
            self._points = torch.tensor(points, device=self._device)

    def search(
        self, query: npt.NDArray[np.float32], count: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """See `Nearest.search`."""
        if min(count, len(self._points)) < 1:
            return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.float32)
        with self._own_stream(), torch.inference_mode():
            # Differences are taken before they are squared: |p|² − 2pq + |q|² loses those of near points.
            far = torch.cdist(
                torch.tensor(query[None], device=self._device),
                self._points,
                compute_mode="donot_use_mm_for_euclid_dist",
            )[0]
            found = far.topk(min(count, len(far)), largest=False)
            rows, distances = found.indices.cpu().numpy(), found.values.cpu().numpy()
        order = np.lexsort((rows, distances))
        return rows[order], distances[order]

    @contextmanager
    def _own_stream(self) -> Iterator[None]:
        if self._stream is None:
            yield
            return
        # The device apart from the stream: left by the stream alone, a thread would go back to the first GPU, and take
        # memory of it for a context that nobody uses.
        with torch.cuda.device(self._stream.device), torch.cuda.stream(self._stream):
            yield
