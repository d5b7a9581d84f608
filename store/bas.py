"""BAS, the values of the FlexSwitch paper: each tensor learns which of four bit-widths it is stored in (arXiv
2604.28109, Eq. 12-15).

The published quantiser divides the whole range of τ, from −v⁻ to v⁺, into 2^b levels and takes their middles:
δ = (v⁺ + v⁻) / 2^b, I = clamp(⌈(τ + v⁻) / δ⌉, 1, 2^b) − 1, Q = −v⁻ + (I + ½) δ (Eq. 13). At one bit the border of both
levels is (v⁺ − v⁻) / 2, not 0: with v⁺ = 1 and v⁻ = ½ a τ of 0.2 becomes −⅛. `Quantiser.SIGNED` is the same over
−v to v with v = max(v⁺, v⁻); there 0 is a border at every width, and no sign can flip.

τ does not change while an expert is learned, so its levels are known beforehand. The range is divided once, into 2^12
equal *cells*: as 2^b divides that, a cell lies within one level of each width.
"""

from __future__ import annotations

import torch

from store.codecs.flex_recipe import Quantiser
from store.encodings import MAX_LEVEL

WIDTHS = (1, 2, 4, 8)
_CELL_BITS = 12
CELLS = 1 << _CELL_BITS
"""Also the cell of entries that are exactly zero, which are never kept."""


def extent(quantiser: Quantiser, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Lower end and length of the ranges that are divided, `[T]` each.

    Args:
        high: `[T, 2]`, v⁺ and v⁻.
    """
    if quantiser == Quantiser.SIGNED:
        high = high.amax(-1, keepdim=True).expand(-1, 2)
    return -high[:, 1], high.sum(-1)


def cells_of(tau: torch.Tensor, low: float, span: float) -> torch.Tensor:
    """`[n]` int16: the cell of each entry, `CELLS` of an exact zero.

    Args:
        tau: `[n]` float32.
        low, span: of its range.
    """
    cells = ((tau - low) * (CELLS / span)).ceil_().clamp_(1, CELLS).sub_(1).to(torch.int16)
    if span == -2 * low:  # a tiny entry's sign must outlast rounding
        half = CELLS // 2
        cells = torch.where(tau > 0, cells.clamp(min=half), cells.clamp_(max=half - 1))
    cells[tau == 0] = CELLS
    return cells


def middles(low: torch.Tensor, span: torch.Tensor, bits: int) -> torch.Tensor:
    """`[T, 2^bits]`: −v⁻ + (I + ½) δ."""
    steps = torch.arange(1 << bits, dtype=span.dtype, device=span.device) + 0.5
    return low[:, None] + steps * (span[:, None] / (1 << bits))


def centres(low: torch.Tensor, span: torch.Tensor) -> torch.Tensor:
    """`[T, CELLS]`: the middle of each cell."""
    return middles(low, span, _CELL_BITS)


def stored_levels(low: torch.Tensor, span: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What each width makes of each cell, as an expert file can hold it: whole multiples of a unit.

    The middles of a symmetric range at up to 4 bits are odd multiples of δ / 2, exactly. Others are rounded to the
    nearest of 127 levels on either side, by at most 1/254 of the largest; what is rounded to 0 is not stored.

    Returns:
        levels `[T, widths, CELLS]` int16, and their units `[T, widths]`, above 0 where the range is.
    """
    levels, units = [], []
    symmetric = span == -2 * low
    for bits in WIDTHS:
        values = middles(low, span, bits)
        odd = (1 << bits) - 1
        top = torch.where(symmetric, odd, MAX_LEVEL) if odd <= MAX_LEVEL else torch.full_like(span, MAX_LEVEL)
        unit = values.abs().amax(-1) / top
        whole = (values / unit.clamp(min=1e-38)[:, None]).round().to(torch.int16)
        levels.append(whole.repeat_interleave(CELLS >> bits, -1))
        units.append(unit)
    return torch.stack(levels, 1), torch.stack(units, 1)


def shares(logits: torch.Tensor, omega: float) -> torch.Tensor:
    """`[T, widths]`: p = softmax(w / ω) (Eq. 12)."""
    return (logits / omega).softmax(-1)


def mean_width(mixture: torch.Tensor) -> torch.Tensor:
    """`[T]`: w̄ = Σ p_i W_i bits."""
    return mixture @ torch.tensor(WIDTHS, dtype=mixture.dtype, device=mixture.device)
