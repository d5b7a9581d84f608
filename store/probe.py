"""How much of a fine-tune differs from its base bit by bit: what decides whether keeping all of it is cheap."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from store.checkpoint import Checkpoint
from store.codecs.overwrite import steps_between
from store.errors import CheckpointError

WORTH = 0.5
"""Changed share up to which `overwrite` is proposed: beyond it, a position costs as much as it saves."""
_PATTERNS = 1 << 16


@dataclass(frozen=True)
class Probe:
    """What overwriting would cost.

    Attributes:
        changed: weights whose 16-bit pattern differs from the base's / all.
        bytes: estimate of an `overwrite` expert, from the entropy of positions and steps; within a few per cent.
        smaller: bytes of all weights in 16 bits / that.
    """

    changed: float
    bytes: int
    smaller: float

    @property
    def is_worth_it(self) -> bool:
        """Whether `overwrite` is what to take: it keeps everything, and still is a fraction of the checkpoint."""
        return self.changed <= WORTH


def probe(base: Checkpoint, tuned: Checkpoint) -> Probe | None:
    """Compare two checkpoints of the same parameters; None where they are not 16-bit weights of one kind.

    One tensor of each in memory; reads all of both.
    """
    changed = total = 0
    bits = 0.0
    for name, tensor in base.tensors.items():
        try:
            _, _, steps = steps_between(name, tensor, tuned.tensors[name])
        except CheckpointError:
            return None
        numel, nnz = tensor.span.numel, len(steps)
        changed, total = changed + nnz, total + numel
        bits += numel * _entropy(np.array([nnz, numel - nnz]))
        bits += nnz * _entropy(np.bincount(steps.view(np.uint16), minlength=_PATTERNS))
    size = max(1, round(bits / 8))
    return Probe(changed / max(1, total), size, 2 * total / size)


def _entropy(counts: np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> float:
    """Bits per draw of a distribution with these counts."""
    shares = counts[counts > 0] / max(1, counts.sum())
    return float(-(shares * np.log2(shares)).sum())
