"""The nearest of many points on the engine's GPU, where faiss was not built for one: PyTorch's distances and top-k."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import numpy as np
import numpy.typing as npt
import torch


class TorchNearest:
    """`router.nearest.Nearest` by comparing a prompt with every point.

    On a GPU it has a stream of its own: behind what the engine has queued a prompt would wait for a whole step.
    """

    def __init__(self, points: npt.NDArray[np.float32], device: str) -> None:
        """Args:
        points: `[n, r]`.
        """
        self._device = torch.device(device)
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None  # type: ignore[no-untyped-call]
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

    def _own_stream(self) -> AbstractContextManager[object]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
