"""FlexSwitch: which entries of each tensor to keep, and how loud, learned within an exact budget (arXiv 2604.28109).

As in the paper, an expert learns from a few exemplars what to keep and one scale per tensor, so that it speaks as its
fine-tune does. What differs most (docs/methods.md has all of it, and what each part is worth):

* The budget is a constraint, not a term of the loss: entries of all tensors compete by a score, and one global
  threshold is put where the bits are spent, anew at every step, while the budget falls from that of a dense start.
* A score starts as log(|τ| / rms τ). A learned shift per tensor is added, as the paper's thresholds would, and to each
  entry's own what it did, or would have done, for the loss.
* The mask is hard from the first step, and values are one bit, so no sign can flip.

This module is the arithmetic of one tensor and of the budget; `store.learning` runs the model. The paper's own recipe
is there as well: `store.lgs`, `store.bas`, `store.soft_student` and `store.paper_course`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from store.codecs.base import ternary
from store.encodings import as_indices, encode_levels
from store.packed import PackedLevels, PackedTernary

MASS_POWER = 0.8
"""Scale ∝ density^−0.8, between keeping the tensor's L1 norm (−1) and its L2 norm (−0.5). So did the best multipliers
of T-Switch go, from density 0.1 to 0.01."""
SPARSEST = 0.002
"""Below that density the scale follows no more: a handful of entries must not outshout their tensor."""
LOWEST = -30.0
"""Score of an exact zero: never kept."""
_SAMPLE = 400_000


@dataclass
class Gate:
    """One tensor of the expert while it is learned: the entries that may be kept, and those that are.

    Attributes:
        shape: of the tensor.
        indices: `[candidates]` int64, flat and ascending.
        sign: `[candidates]` float32, of τ.
        score: `[candidates]` float32, the higher the sooner it is kept; comparable between tensors.
        pristine: `[candidates]` float32, what the base has there.
        mass: mean |τ| over the whole tensor.
        volume: log of the factor on the scale.
        mask: `[candidates]` bool, what is kept.
        kept: how many that are.
    """

    shape: tuple[int, ...]
    indices: torch.Tensor
    sign: torch.Tensor
    score: torch.Tensor
    pristine: torch.Tensor
    mass: float
    volume: float = 0.0

    def __post_init__(self) -> None:
        self.keep(math.inf)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def scale(self) -> float:
        """What a kept entry is worth."""
        density = max(self.kept / self.numel, SPARSEST)
        return self.mass * math.exp(self.volume - MASS_POWER * math.log(density))

    def keep(self, threshold: float) -> None:
        """Keep the entries whose score is above a threshold."""
        self.mask = self.score > threshold
        self.kept = int(self.mask.sum())

    def narrow(self) -> None:
        """Forget the candidates that are not kept."""
        self.indices, self.sign = self.indices[self.mask], self.sign[self.mask]
        self.score, self.pristine = self.score[self.mask], self.pristine[self.mask]
        self.mask = self.mask[self.mask]

    def write(self, parameter: torch.Tensor) -> None:
        """`parameter ← pristine ± scale` where an entry is kept, and what the base has at the other candidates."""
        values = torch.addcmul(self.pristine, self.sign, self.mask.float(), value=self.scale)
        parameter.view(-1)[self.indices] = values.to(parameter.dtype)

    def gains(self, gradient: torch.Tensor) -> torch.Tensor:
        """`[candidates]` float32: how fast the loss falls, to first order, as an entry of the expert grows.

        Args:
            gradient: ∂loss/∂parameter, in the tensor's shape.
        """
        return gradient.reshape(-1)[self.indices].float().mul_(self.sign).mul_(-self.scale)

    def pack(self, name: str) -> PackedTernary | None:
        """What is stored; None where nothing is kept.

        Raises:
            CheckpointError: the scale leaves float32.
        """
        if not self.kept:
            return None
        mask = self.mask.cpu().numpy()
        indices, positive = self.indices.cpu().numpy()[mask], self.sign.cpu().numpy()[mask] > 0
        return ternary(name, self.shape, indices, positive, self.scale)


def multiples(
    name: str, shape: tuple[int, ...], indices: np.ndarray, levels: np.ndarray, unit: float
) -> PackedTernary | None:
    """What is stored of entries that are whole multiples of a unit: ternary where all are of one magnitude.

    Args:
        name: of the tensor.
        shape: of the tensor.
        indices: `[kept]`, flat and ascending.
        levels: `[kept]` int8, 0 where nothing is to be stored.
        unit: what a level of 1 is worth.

    Raises:
        CheckpointError: the unit leaves float32.
    """
    indices, levels = indices[levels != 0], levels[levels != 0]
    if not len(indices):
        return None
    magnitudes = np.abs(levels)
    same = bool((magnitudes == magnitudes[0]).all())
    packed = ternary(name, shape, indices, levels > 0, unit * float(magnitudes[0]) if same else unit)
    if same:
        return packed
    numel = math.prod(shape)
    encoded = encode_levels(as_indices(indices, numel), levels, numel)
    return PackedLevels(shape, len(indices), packed.scale, encoded)


def bits_of(share: np.ndarray | float, numel: np.ndarray | float) -> np.ndarray:
    """Bits that a random mask of that density and its signs take: the entropy, and what Rice code adds to it."""
    share = np.clip(np.asarray(share, dtype=np.float64), 1e-300, 1.0)
    rest = np.maximum(1.0 - share, 1e-300)
    entropy = -share * np.log2(share) - rest * np.log2(rest)
    found: np.ndarray = np.where(share < 1.0, 1.015 * numel * (entropy + share), numel * share)
    return found


def density_of(bits: float, numel: int) -> float:
    """The density, up to 2/3, whose random mask and signs take that many bits; denser ones take fewer again."""
    low, high = 0.0, 2 / 3
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if float(bits_of(middle, numel)) > bits else (middle, high)
    return low


def threshold_for(scores: torch.Tensor, borders: np.ndarray, numels: np.ndarray, bits: float) -> float:
    """The lowest threshold at which the entries above it are expected to take at most that many bits, from a sample.

    Args:
        scores: `[candidates]` of all gates behind each other.
        borders: `[gates + 1]` where each gate's begin.
        numels: `[gates]` elements of each tensor.
    """
    stride = max(1, len(scores) // _SAMPLE)
    sample = scores[::stride].cpu().numpy()
    order = np.argsort(-sample, kind="stable")
    owner = (np.searchsorted(borders, np.arange(0, len(scores), stride), side="right") - 1)[order]
    low, high = 0, len(order)  # how many of the sample may be kept
    while low < high:
        middle = (low + high + 1) // 2
        kept = np.minimum(stride * np.bincount(owner[:middle], minlength=len(numels)), numels)
        if float(bits_of(kept / numels, numels).sum()) > bits:
            high = middle - 1
        else:
            low = middle
    return float(sample[order[low]]) if low < len(order) else -math.inf


def log_magnitude(tau: torch.Tensor) -> torch.Tensor:
    """The scores that the learning starts from: log(|τ| / rms τ), float32, of a tensor that is not all zero."""
    return (tau.abs() / tau.double().square().mean().sqrt().float()).log_().clamp_(min=LOWEST)


def along_the_budget(slopes: torch.Tensor, costs: torch.Tensor) -> torch.Tensor:
    """A gradient without its component along `costs`: the direction that leaves the size as it is (RCO, 2605.00649)."""
    return slopes - (slopes @ costs) / (costs @ costs).clamp(min=1e-30) * costs
