"""K-Means, as the router uses it."""

from __future__ import annotations

import faiss
import numpy as np
import numpy.typing as npt

from router.features import Features

_ITERATIONS = 20


def clusters(points: Features, count: int, seed: int) -> npt.NDArray[np.int64]:
    """`[n]`: which of at most `count` K-Means clusters each point is in; none of them is empty."""
    if len(points) <= count:
        return np.arange(len(points))
    # faiss works on a hundred points: threads of its own would only get in the way of the engine's.
    faiss.omp_set_num_threads(1)
    kmeans = faiss.Kmeans(
        points.shape[1], count, niter=_ITERATIONS, seed=seed, min_points_per_centroid=1, verbose=False
    )
    kmeans.train(points)
    nearest: npt.NDArray[np.int64] = kmeans.index.search(points, 1)[1][:, 0]
    members: npt.NDArray[np.int64] = np.unique(nearest, return_inverse=True)[1]
    return members
