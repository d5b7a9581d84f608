"""FlexSwitch: how much of each tensor to keep, and how loud, learned within an exact budget (arXiv 2604.28109).

As in the paper, an expert learns one threshold and one scale per tensor so that it speaks as its fine-tune does. What
differs most (docs/methods.md has all of it, and why):

* The budget is a constraint, not a term of the loss. Entries of all tensors compete in `log(|τ| / rms τ) + shift`, with
  a learned shift per tensor, and the one global threshold is where the bits are spent. It is solved anew at every
  step, while the budget falls from that of a dense start to the final one.
* The mask is hard from the first step. A ramp around the threshold passes the gradient to the shifts, less its part
  along which the size would change.
* Values are one bit, so no sign can flip; scales grow as entries go, as the mass of the tensor would have them.

This module is the arithmetic of one tensor and of the budget; `store.learning` runs the model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from store.codecs.base import ternary
from store.packed import PackedTernary

MASS_POWER = 0.8
"""Scale ∝ density^−0.8, between keeping the tensor's L1 norm (−1) and its L2 norm (−0.5). So did the best multipliers
of T-Switch go, from density 0.1 to 0.01."""
_SAMPLE = 50_000
_LOWEST = -30.0
"""Score of an exact zero: never kept."""


@dataclass
class Gate:
    """One tensor of the expert while it is learned.

    Attributes:
        shape: of the tensor.
        score: `[numel]` float16, log(|τ| / rms τ).
        negative: `[numel]` bool, where τ < 0.
        mass: mean |τ|.
        shift: added to every score.
        volume: log of the factor on the scale.
        kept: entries above the threshold, as last written.
    """

    shape: tuple[int, ...]
    score: torch.Tensor
    negative: torch.Tensor
    mass: float
    shift: float = 0.0
    volume: float = 0.0
    kept: int = 0
    _sample: torch.Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        step = max(1, self.numel // _SAMPLE)
        self._sample = self.score[::step].float().sort().values

    @property
    def numel(self) -> int:
        return self.score.numel()

    @property
    def scale(self) -> float:
        """What a kept entry is worth."""
        density = max(self.kept, 1) / self.numel
        return self.mass * math.exp(self.volume - MASS_POWER * math.log(density))

    def expected(self, threshold: float) -> float:
        """The share of entries above a global threshold, from a sample."""
        below = torch.searchsorted(self._sample, threshold - self.shift, right=True)
        return 1.0 - float(below) / len(self._sample)

    def write(self, threshold: float, parameter: torch.Tensor, pristine: torch.Tensor) -> None:
        """`parameter ← pristine ± scale` where an entry is above the threshold."""
        mask = self.score > threshold - self.shift
        self.kept = int(mask.sum())
        values = torch.where(self.negative, -self.scale, self.scale).mul_(mask)
        parameter.copy_(values.view(self.shape).to(parameter.device).add_(pristine.to(parameter.device)))

    def slopes(self, threshold: float, gradient: torch.Tensor, width: float) -> tuple[float, float, float]:
        """∂loss/∂volume, ∂loss/∂shift and ∂kept/∂shift, the mask seen as a ramp of `2 · width` around the threshold.

        Args:
            gradient: ∂loss/∂parameter, in the tensor's shape.
        """
        distance = self.score.float().sub_(threshold - self.shift)
        flat = gradient.reshape(-1).float().cpu()
        signed = torch.where(self.negative, -flat, flat)
        on_ramp = distance.abs() < width
        volume = float(signed[distance > 0].sum()) * self.scale
        shift = float(signed[on_ramp].sum()) * self.scale / (2 * width)
        return volume, shift, float(on_ramp.sum()) / (2 * width)

    def pack(self, name: str, threshold: float) -> PackedTernary | None:
        """What is stored; None where nothing is kept.

        Raises:
            CheckpointError: the scale leaves float32.
        """
        indices = np.flatnonzero((self.score > threshold - self.shift).numpy())
        self.kept = len(indices)
        if not self.kept:
            return None
        return ternary(name, self.shape, indices, ~self.negative.numpy()[indices], self.scale)


def gate_of(tau: torch.Tensor) -> Gate | None:
    """The gate of a delta (float32, any shape); None if it is all zero."""
    flat = tau.reshape(-1)
    rms = float(flat.double().square().mean().sqrt())
    if not rms:
        return None
    score = (flat.abs() / rms).log_().clamp_(min=_LOWEST).half()
    return Gate(tuple(tau.shape), score, flat < 0, float(flat.abs().double().mean()))


def bits_of(share: float, numel: int) -> float:
    """Bits that a random mask of that density and its signs take: the entropy, and what Rice code adds to it."""
    if not 0.0 < share < 1.0:
        return share * numel
    entropy = -share * math.log2(share) - (1 - share) * math.log2(1 - share)
    return 1.015 * numel * (entropy + share)


def threshold_for(gates: Sequence[Gate], bits: float) -> float:
    """The lowest global threshold at which all gates together are expected to take at most that many bits."""
    low, high = _LOWEST, 30.0
    for _ in range(40):
        middle = (low + high) / 2
        if sum(bits_of(gate.expected(middle), gate.numel) for gate in gates) > bits:
            low = middle
        else:
            high = middle
    return high


def along_the_budget(slopes: torch.Tensor, costs: torch.Tensor) -> torch.Tensor:
    """A gradient without its component along `costs`: the direction that leaves the size as it is (RCO, 2605.00649)."""
    return slopes - (slopes @ costs) / (costs @ costs).clamp(min=1e-30) * costs
