"""OPCM: experts folded into one, one after the other, in the memory of two (arXiv 2501.09522)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import numpy.typing as npt
import torch

Deltas = Mapping[str, npt.NDArray[np.float32]]
"""Flat float32 deltas of one expert by name; a tensor that did not change is not there."""


def opcm(
    experts: Iterable[Deltas], shapes: Mapping[str, tuple[int, ...]], *, dominant: float = 0.5, two_sided: bool = False
) -> dict[str, npt.NDArray[np.float32]]:
    """Merge task vectors sequentially: each new one is projected away from what the merged ones mainly say.

    With mₜ the merged delta, n̄ₜ the mean norm so far, m₁ = τ₁ and λ₁ = 1: Sₜ = λₜ₋₁ mₜ₋₁ + P(τₜ), λₜ = ‖Sₜ‖ / n̄ₜ and
    mₜ = Sₜ / λₜ, so that the result's norm is the mean of the experts'.

    Args:
        experts: in the order in which they are folded in; each is let go before the next one is asked for.
        shapes: of the base's tensors.
        dominant: the share α, 0 to 1, of the sum of singular values that counts as dominant.
        two_sided: take the dominant rows and columns out, as the paper's sum has it; else only the block where they
            meet, as the authors' code has it.

    Returns:
        The merged deltas, flat.
    """
    merged: dict[str, npt.NDArray[np.float32]] = {}
    factor, mean_norm = 1.0, 0.0
    for count, deltas in enumerate(experts, start=1):
        norm = _norm(deltas.values())
        mean_norm += (norm - mean_norm) / count
        for name in sorted(merged.keys() | deltas.keys()):
            if name not in deltas:
                merged[name] = np.float32(factor) * merged[name]
            elif name not in merged:
                merged[name] = np.array(deltas[name], dtype=np.float32)
            else:
                shape = shapes[name]
                added = deltas[name]
                if len(shape) == 2:
                    before, new = (torch.from_numpy(part).view(shape) for part in (merged[name], added))
                    added = projected(before, new, dominant, two_sided=two_sided).reshape(-1).numpy()
                merged[name] = np.float32(factor) * merged[name] + added
        size = _norm(merged.values())
        factor = size / mean_norm if size and mean_norm else 1.0
        merged = {name: values / np.float32(factor) for name, values in merged.items()}
    return merged


def projected(merged: torch.Tensor, added: torch.Tensor, dominant: float, *, two_sided: bool) -> torch.Tensor:
    """`added`, `[m, n]`, without its part along the dominant singular directions of `merged`, and without what lies on
    the diagonal of its basis; the result is orthogonal to `merged`.

    What lies outside both bases passes as it is, so that the economy decomposition does.
    """
    left, values, right = torch.linalg.svd(merged, full_matrices=False)
    total = float(values.sum())
    if not total:
        return added
    rank = int(torch.searchsorted(values.cumsum(0), dominant * total)) + 1 if dominant > 0 else 0
    rank = min(rank, len(values))
    core = left.T @ added @ right.T
    removed = torch.diag(core.diagonal())
    removed[:rank, :rank] = core[:rank, :rank]
    result: torch.Tensor = added - left @ removed @ right
    if two_sided:
        rows, columns = left[:, :rank], right[:rank]
        block = core[:rank, :rank]
        result = result - (rows @ (rows.T @ added) - rows @ block @ columns)
        result = result - ((added @ columns.T) @ columns - rows @ block @ columns)
    return result


def _norm(parts: Iterable[npt.NDArray[np.float32]]) -> float:
    return math.sqrt(sum(_squares(parts)))


def _squares(parts: Iterable[npt.NDArray[np.float32]]) -> Iterator[float]:
    for part in parts:
        yield float(np.sum(np.square(part, dtype=np.float64)))
