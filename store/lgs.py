"""LGS, the gates of the FlexSwitch paper: which values of a tensor pass, by one learned threshold on either side of
zero (arXiv 2604.28109, Eq. 6-8).

A threshold is a learned place φ(s) ∈ (0, 1) in the range of the magnitudes on its side, and a gate is a sigmoid around
it that a temperature ρ makes steeper as the learning goes on. All functions take `T` tensors at once, of each a row of
`C` values that stand for all of it, and gradients flow through them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

DROP, STAGES = 0.9, 50
"""The temperatures ρ of the gates and ω of the bit-widths are 1 at the start, and multiplied by 0.9 at every fiftieth
of the steps: in the paper, every 10 of 500."""


@dataclass(frozen=True)
class Ranges:
    """The magnitudes of tensors' entries; column 0 is of those above zero, column 1 of those below.

    Attributes:
        low, high: `[T, 2]` float32, smallest and largest magnitude; both 0 where there are no entries.
    """

    low: torch.Tensor
    high: torch.Tensor

    @property
    def span(self) -> torch.Tensor:
        """`[T, 2]`: r⁺ and r⁻."""
        return self.high - self.low


def ranges_of(tau: torch.Tensor) -> tuple[list[float], list[float]]:
    """A row of `Ranges`, (low, high): of one tensor, flat."""
    low, high = [], []
    for side in (tau[tau > 0], -tau[tau < 0]):
        low.append(float(side.min()) if len(side) else 0.0)
        high.append(float(side.max()) if len(side) else 0.0)
    return low, high


def temperature(done: float) -> float:
    """ρ and ω where a share `done` of the steps lies behind."""
    return DROP ** int(STAGES * done + 1e-9)


def portion(logits: torch.Tensor) -> torch.Tensor:
    """φ(s) = arctan(s) / π + ½ (Eq. 6), whose slope falls as 1 / s² and no faster."""
    return logits.atan() / math.pi + 0.5


def logits_for(portions: torch.Tensor) -> torch.Tensor:
    """The s of which φ(s) are these, or nearly 0 or 1 where they are 0 or 1."""
    return ((portions.clamp(1e-3, 1 - 1e-3) - 0.5) * math.pi).tan()


def thresholds(logits: torch.Tensor, ranges: Ranges) -> torch.Tensor:
    """`[T, 2]`: t± = v±min + φ(s±) · r±."""
    return ranges.low + portion(logits) * ranges.span


def soft_mask(tau: torch.Tensor, logits: torch.Tensor, ranges: Ranges, rho: float) -> torch.Tensor:
    """`[T, C]`: M = σ((τ − t⁺) / (ρ r⁺)) + σ((−t⁻ − τ) / (ρ r⁻)) (Eq. 7).

    A side without entries has no gate; where all of a side's are of one magnitude, r = 0, it passes whole.

    Args:
        tau: `[T, C]`.
        logits: `[T, 2]`, s⁺ and s⁻.
        rho: the temperature, above 0.
    """
    floor = thresholds(logits, ranges)
    mask = torch.zeros_like(tau)
    for column, side in enumerate((tau, -tau)):
        low, high = ranges.low[:, column, None], ranges.high[:, column, None]
        width = torch.where(high > low, rho * (high - low), 1.0)
        gate = ((side - floor[:, column, None]) / width).sigmoid()
        mask = mask + torch.where(high > low, gate, ((high > 0) & (side > 0)).to(tau.dtype))
    return mask


def hard_mask(tau: torch.Tensor, logits: torch.Tensor, ranges: Ranges) -> torch.Tensor:
    """`[T, C]` bool: M > ½ (Eq. 8) of the gates at ρ → 0, which at the last temperature are all but that."""
    floor = thresholds(logits, ranges)
    mask = torch.zeros_like(tau, dtype=torch.bool)
    for column, side in enumerate((tau, -tau)):
        low, high = ranges.low[:, column, None], ranges.high[:, column, None]
        mask |= (side > 0) & (high > 0) & ((side >= floor[:, column, None]) | (high == low))
    return mask
