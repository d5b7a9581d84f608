"""How the deltas of several experts become one, entry by entry. NumPy only; no torch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import numpy.typing as npt

Taus = npt.NDArray[np.float32]
"""`[experts, numel]` float32: one tensor's deltas, times the experts' weights."""


class Method(StrEnum):
    """How deltas become one; formulas in docs/methods.md."""

    TASK_ARITHMETIC = "task-arithmetic"
    TIES = "ties"
    DARE = "dare"
    RAM = "ram"
    RAM_PLUS = "ram-plus"
    RAM_PLUS_CHANGED = "ram-plus-changed"
    RAM_PLUS_TENSOR = "ram-plus-tensor"
    OPCM = "opcm"
    ATLAS = "atlas"


_SUMS = (Method.TASK_ARITHMETIC, Method.DARE)
_SUM_STRENGTH = 0.3
_TENSOR_CAP, _TENSOR_RATE = 0.2, 0.1


@dataclass(frozen=True)
class MergeSettings:
    """How to merge.

    Attributes:
        method: which.
        strength: multiplier of the result; None is 0.3 for the methods that add up two or more, else 1.
        drop: share of the entries that `dare` drops, 0 ≤ drop < 1.
        raised: factor of `ram-plus` and `ram-plus-changed` on what only one expert changed, where all is shared.
        seed: of `dare`.
        dominant, two_sided: of `opcm`; see `store.opcm`.
        shots: of `atlas`: exemplars of each expert that the blend is learned from, at most.
    """

    method: Method = Method.TIES
    strength: float | None = None
    drop: float = 0.5
    raised: float = 1.2
    seed: int = 0
    dominant: float = 0.5
    two_sided: bool = False
    shots: int = 16

    def factor_of(self, experts: int) -> float:
        """What the result of so many experts is multiplied by."""
        if self.strength is not None:
            return self.strength
        return _SUM_STRENGTH if self.method in _SUMS and experts > 1 else 1.0


def merger(
    settings: MergeSettings, tensors: Callable[[], Iterator[Taus]]
) -> Callable[[str, Taus], npt.NDArray[np.float32]]:
    """The function that merges one tensor, given its name and `Taus`.

    Args:
        settings: the method, and what belongs to it.
        tensors: every tensor's deltas, for the methods that count over all of them first.
    """
    method = settings.method
    if method is Method.TASK_ARITHMETIC:
        return lambda _name, taus: taus.sum(axis=0)
    if method is Method.TIES:
        return lambda _name, taus: ties(taus)
    if method is Method.DARE:
        return lambda name, taus: dare(taus, settings.drop, _generator(settings.seed, name))
    if method is Method.RAM:
        return lambda _name, taus: ram(taus, np.ones(len(taus)))
    if method is Method.RAM_PLUS_TENSOR:
        return lambda _name, taus: ram(taus, 1 + _TENSOR_RATE * np.minimum(shared_ratio(shares(taus)), _TENSOR_CAP))
    total = sum(shares(taus) for taus in tensors())
    ratio = shared_ratio(np.asarray(total), of_changed=method is Method.RAM_PLUS_CHANGED)
    raised = 1 + (settings.raised - 1) * np.minimum(ratio, 1.0)
    return lambda _name, taus: ram(taus, raised)


def ties(taus: Taus) -> npt.NDArray[np.float32]:
    """Per entry the mean of the deltas on the side of the greater mass; where both weigh the same, nothing."""
    side = np.sign(taus.sum(axis=0))
    agree = taus * side > 0
    return np.asarray((taus * agree).sum(axis=0) / np.maximum(agree.sum(axis=0), 1), dtype=np.float32)


def dare(taus: Taus, drop: float, generator: np.random.Generator) -> npt.NDArray[np.float32]:
    """The sum of the deltas, each entry of each dropped with that probability and otherwise divided by 1 − drop."""
    kept = generator.random(taus.shape, dtype=np.float32) >= drop
    return np.asarray((taus * kept).sum(axis=0) / (1 - drop), dtype=np.float32)


def ram(taus: Taus, raised: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    """Per entry the mean over the experts that changed it; what only expert k changed is multiplied by `raised[k]`."""
    changed = taus != 0
    count = changed.sum(axis=0)
    mean = taus.sum(axis=0) / np.maximum(count, 1)
    factor = (changed * raised[:, None].astype(np.float32)).sum(axis=0)
    return np.asarray(np.where(count == 1, mean * factor, mean), dtype=np.float32)


def shares(taus: Taus) -> npt.NDArray[np.int64]:
    """`[experts, 2]`: how many entries an expert changed together with others, and alone."""
    changed = taus != 0
    alone = changed & (changed.sum(axis=0) == 1)
    return np.stack([(changed & ~alone).sum(axis=1), alone.sum(axis=1)], axis=1)


def shared_ratio(counts: npt.NDArray[np.int64], *, of_changed: bool = False) -> npt.NDArray[np.float64]:
    """Shared / unique entries of each expert, or shared / changed; 0 for an expert without any to divide by."""
    shared, alone = counts[:, 0], counts[:, 1]
    against = shared + alone if of_changed else alone
    return np.asarray(shared / np.maximum(against, 1) * (against > 0), dtype=np.float64)


def _generator(seed: int, name: str) -> np.random.Generator:
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "little"))
