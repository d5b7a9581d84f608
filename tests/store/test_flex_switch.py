from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from store.codecs.flex_switch import Gate, along_the_budget, bits_of, gate_of, threshold_for

WIDTH = 0.25


def random_gate(seed: int, rows: int = 40, columns: int = 60) -> tuple[torch.Tensor, Gate]:
    tau = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) ** 3 * 0.01
    gate = gate_of(tau)
    assert gate is not None
    return tau, gate


def reference(tau: torch.Tensor, gate: Gate, threshold: float) -> torch.Tensor:
    """The gated task vector in plain PyTorch."""
    score = (tau.abs() / tau.double().square().mean().sqrt().float()).log().half()
    return tau.sign() * (score > threshold - gate.shift) * gate.scale


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 1000), threshold=st.floats(-3, 4), shift=st.floats(-1, 1), volume=st.floats(-1, 1))
def test_what_is_written_is_what_is_packed(seed: int, threshold: float, shift: float, volume: float) -> None:
    tau, gate = random_gate(seed)
    gate.shift, gate.volume = shift, volume
    pristine = torch.randn(tau.shape)
    parameter = torch.empty_like(pristine)
    gate.write(threshold, parameter, pristine)
    expected = reference(tau, gate, threshold)
    torch.testing.assert_close(parameter, pristine + expected)
    packed = gate.pack("w", threshold)
    if packed is None:
        assert not expected.any()
        return
    delta = packed.decode("w")
    dense = torch.zeros(tau.numel())
    dense[torch.from_numpy(delta.indices).long()] = torch.from_numpy(delta.levels) * delta.scale
    torch.testing.assert_close(dense.view(tau.shape), expected, rtol=1e-6, atol=0)


def test_no_sign_flips_and_a_zero_is_never_kept() -> None:
    tau, _ = random_gate(0)
    tau[3:] = 0.0
    gate = gate_of(tau)
    assert gate is not None
    parameter = torch.empty_like(tau)
    gate.write(-29.0, parameter, torch.zeros_like(tau))
    assert torch.equal(parameter.sign(), tau.sign())
    assert gate_of(torch.zeros(3, 5)) is None


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), threshold=st.floats(-1, 2))
def test_slopes_are_those_of_autograd_through_a_ramp(seed: int, threshold: float) -> None:
    """The scale's slope is exact, the shift's that of the mask clamp((score − threshold + width) / 2 width, 0, 1)."""
    tau, gate = random_gate(seed)
    gradient = torch.randn(tau.shape, generator=torch.Generator().manual_seed(seed + 1))
    gate.write(threshold, torch.empty_like(tau), torch.zeros_like(tau))
    volume, shift, cost = gate.slopes(threshold, gradient, WIDTH)

    score = gate.score.float().view(tau.shape)
    log_factor, moved = torch.zeros((), requires_grad=True), torch.zeros((), requires_grad=True)
    hard = (score > threshold).float()
    (gradient * tau.sign() * hard * gate.scale * log_factor.exp()).sum().backward()  # type: ignore[no-untyped-call]
    ramp = ((score + moved - threshold + WIDTH) / (2 * WIDTH)).clamp(0, 1)
    (gradient * tau.sign() * ramp * gate.scale).sum().backward()
    assert log_factor.grad is not None
    assert moved.grad is not None
    assert volume == pytest.approx(float(log_factor.grad), rel=1e-3, abs=1e-4)
    on_edge = (score - threshold).abs() == WIDTH
    if not bool(on_edge.any()):
        assert shift == pytest.approx(float(moved.grad), rel=1e-3, abs=1e-4)
        assert cost == pytest.approx(float(((score - threshold).abs() < WIDTH).sum()) / (2 * WIDTH))


@pytest.mark.parametrize("bits", [500.0, 3_000.0, 12_000.0])
def test_the_threshold_spends_the_budget(bits: float) -> None:
    gates = [random_gate(0)[1] for _ in range(5)]
    for row, gate in enumerate(gates):
        gate.shift = 0.3 * row
    threshold = threshold_for(gates, bits)
    sizes = [gate.pack("w", threshold) for gate in gates]
    spent = sum(8 * packed.nbytes for packed in sizes if packed is not None)
    assert spent == pytest.approx(bits, rel=0.1, abs=80)
    shares = [gate.kept / gate.numel for gate in gates]
    assert shares == sorted(shares)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 1000), count=st.integers(1, 30))
def test_the_projected_step_leaves_the_size_as_it_is(seed: int, count: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    slopes = torch.randn(count, generator=generator, dtype=torch.float64)
    costs = torch.rand(count, generator=generator, dtype=torch.float64)
    assert float(along_the_budget(slopes, costs) @ costs) == pytest.approx(0, abs=1e-9)
    assert torch.equal(along_the_budget(slopes, torch.zeros(count, dtype=torch.float64)), slopes)


def test_bits_of_is_the_entropy_and_signs() -> None:
    assert bits_of(0.0, 100) == 0.0
    assert bits_of(1.0, 100) == 100.0
    entropy = -(0.1 * math.log2(0.1) + 0.9 * math.log2(0.9))
    assert bits_of(0.1, 1000) == pytest.approx(1000 * (entropy + 0.1), rel=0.02)
