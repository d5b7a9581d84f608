"""The gates and the quantiser of the FlexSwitch paper, against its formulas written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from store.bas import CELLS, WIDTHS, cells_of, centres, extent, mean_width, middles, shares, stored_levels
from store.codecs.flex_recipe import Quantiser
from store.lgs import Ranges, hard_mask, logits_for, portion, ranges_of, soft_mask, temperature, thresholds

QUANTISERS = list(Quantiser)


def values(seed: int, count: int = 300) -> torch.Tensor:
    """Some τ: of heavy tails and a lopsided range, with exact zeros."""
    generator = torch.Generator().manual_seed(seed)
    tau = torch.randn(count, generator=generator) ** 3 * (0.1 + torch.rand(1, generator=generator))
    tau[tau < 0] *= float(torch.rand(1, generator=generator))
    tau[:7] = 0.0
    return tau


def ranges(*tensors: torch.Tensor) -> Ranges:
    lows, highs = (torch.tensor(rows, dtype=torch.float64) for rows in zip(*map(ranges_of, tensors), strict=True))
    return Ranges(lows, highs)


def test_temperatures_are_the_paper_s() -> None:
    found = [temperature(step / 500) for step in range(500)]
    assert found == pytest.approx([0.9 ** (step // 10) for step in range(500)])


@given(share=st.floats(0.002, 0.998))
def test_a_place_in_the_range_has_its_logit(share: float) -> None:
    assert float(portion(logits_for(torch.tensor(share, dtype=torch.float64)))) == pytest.approx(share)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1000), rho=st.floats(0.005, 1), s=st.tuples(st.floats(-5, 5), st.floats(-5, 5)))
def test_a_gate_is_the_formula(seed: int, rho: float, s: tuple[float, float]) -> None:
    tau = values(seed).double()
    above, below = tau[tau > 0], -tau[tau < 0]
    t = [
        side.min() + (math.atan(logit) / math.pi + 0.5) * (side.max() - side.min())
        for side, logit in zip((above, below), s, strict=True)
    ]
    r = [side.max() - side.min() for side in (above, below)]
    expected = torch.sigmoid((tau - t[0]) / (rho * r[0])) + torch.sigmoid((-t[1] - tau) / (rho * r[1]))
    logits, found = torch.tensor([s], dtype=torch.float64), ranges(tau)
    torch.testing.assert_close(thresholds(logits, found)[0], torch.stack(t), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(soft_mask(tau[None], logits, found, rho)[0], expected, rtol=1e-6, atol=1e-6)
    hard = hard_mask(tau[None], logits, found)[0]
    assert torch.equal(hard, (tau >= thresholds(logits, found)[0, 0]) | (-tau >= thresholds(logits, found)[0, 1]))
    if min(float(t[0] / r[0]), float(t[1] / r[1])) > 0.1:  # else a weak entry passes a little on both sides
        assert torch.equal(soft_mask(tau[None], logits, found, 0.005)[0] > 0.5, hard)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), rho=st.floats(0.01, 1), s=st.tuples(st.floats(-4, 4), st.floats(-4, 4)))
def test_a_gate_s_gradient_is_that_of_finite_differences(seed: int, rho: float, s: tuple[float, float]) -> None:
    tau = torch.stack([values(seed), values(seed + 1)]).double()
    weights = torch.randn(tau.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = ranges(*tau)
    logits = torch.tensor([s, s[::-1]], dtype=torch.float64, requires_grad=True)
    (weights * soft_mask(tau, logits, found, rho)).sum().backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    step = 1e-6
    for place in range(4):
        ends = []
        for sign in (1, -1):
            moved = logits.detach().clone()
            moved.view(-1)[place] += sign * step
            ends.append(float((weights * soft_mask(tau, moved, found, rho)).sum()))
        assert float(logits.grad.view(-1)[place]) == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-4, abs=1e-6)


def test_sides_without_a_range() -> None:
    """Entries of one magnitude pass whole, and a side without entries has no gate."""
    tau = torch.tensor([[0.5, 0.5, 0.0, -0.1, -0.3], [0.2, 0.1, 0.4, 0.3, 0.0]], dtype=torch.float64)
    found = ranges(*tau)
    logits = torch.full((2, 2), 3.0, dtype=torch.float64)
    assert hard_mask(tau, logits, found).tolist() == [
        [True, True, False, False, True],
        [False, False, True, False, False],
    ]
    soft = soft_mask(tau, logits, found, 0.01)
    assert bool(torch.isfinite(soft).all())
    assert soft[0, :2].tolist() == [1.0, 1.0]
    assert float(soft[1, 4]) < 1e-6


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1000), quantiser=st.sampled_from(QUANTISERS))
def test_the_levels_of_a_cell_are_those_of_its_entries(seed: int, quantiser: Quantiser) -> None:
    tau = values(seed)
    low, span = extent(quantiser, torch.tensor([ranges_of(tau)[1]]))
    cells = cells_of(tau, float(low), float(span)).long()
    assert torch.equal(cells == CELLS, tau == 0)
    tau, cells = tau[tau != 0], cells[tau != 0]
    assert float((centres(low, span)[0, cells] - tau).abs().max()) <= float(span) / CELLS * 0.51
    levels, units = stored_levels(low, span)
    assert int(levels.abs().max()) <= 127
    for row, bits in enumerate(WIDTHS):
        delta = span.double() / 2**bits  # Eq. 13
        place = (tau.double() - low.double()) / delta
        index = place.ceil().clamp(1, 2**bits) - 1
        expected = low.double() + (index + 0.5) * delta
        stored = levels[0, row, cells] * units[0, row].double()
        rounding = 0.0 if quantiser is Quantiser.SIGNED and bits < 8 else float(expected.abs().max()) / 250
        sure = (place - place.round()).abs() > 1e-3  # elsewhere float32 may see it on the other side of a border
        assert float((stored - expected)[sure].abs().max()) <= rounding + 1e-5 * float(span)
        if quantiser is Quantiser.SIGNED:
            assert not bool((stored * tau < 0).any())
            assert bits == 8 or bool((stored != 0).all())


@given(tau=st.floats(1e-30, 1.0), negative=st.booleans())
def test_however_small_a_signed_value_keeps_its_sign(tau: float, negative: bool) -> None:
    sign = -1.0 if negative else 1.0
    low, span = extent(Quantiser.SIGNED, torch.tensor([[1.0, 0.25]]))
    cell = int(cells_of(torch.tensor([sign * tau]), float(low), float(span)))
    assert float(centres(low, span)[0, cell]) * sign > 0


def test_the_published_quantiser_flips_signs() -> None:
    """With v⁺ = 1 and v⁻ = ½ one bit makes −⅛ of 0.2, and ⅝ of 0.3; and −½ + … never 0 of what lies above ¼."""
    low, span = extent(Quantiser.PAPER, torch.tensor([[1.0, 0.5]]))
    assert middles(low, span, 1)[0].tolist() == [-0.125, 0.625]
    levels, units = stored_levels(low, span)
    cells = cells_of(torch.tensor([0.2, 0.3]), float(low), float(span)).long()
    assert (levels[0, 0, cells] * units[0, 0]).tolist() == pytest.approx([-0.125, 0.625], abs=0.625 / 254)
    low, span = extent(Quantiser.SIGNED, torch.tensor([[1.0, 0.5]]))
    assert middles(low, span, 1)[0].tolist() == [-0.5, 0.5]


def test_widths_sharpen_with_the_temperature() -> None:
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.1, 0.2, 0.0, -0.1]], requires_grad=True)
    found = mean_width(shares(logits, 1.0))
    assert found[0].item() == pytest.approx(np.mean(WIDTHS))
    found.sum().backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    assert bool((logits.grad[0, :2] < 0).all())
    assert float(logits.grad[0, 3]) > 0
    assert mean_width(shares(logits, temperature(0.999)))[1].item() == pytest.approx(2.0, abs=1e-3)
