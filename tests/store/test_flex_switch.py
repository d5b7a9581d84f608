from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from store.checkpoint import Checkpoint, open_checkpoint
from store.codecs.base import Loss
from store.codecs.flex_switch import LOWEST, Gate, along_the_budget, bits_of, density_of, log_magnitude, threshold_for
from store.errors import InvalidRequestError
from store.objective import objective
from store.student import Student


def random_gate(seed: int, rows: int = 40, columns: int = 60) -> tuple[torch.Tensor, torch.Tensor, Gate]:
    """(τ, pristine, a gate of every entry)."""
    generator = torch.Generator().manual_seed(seed)
    tau = torch.randn(rows, columns, generator=generator) ** 3 * 0.01
    pristine = torch.randn(rows, columns, generator=generator)
    flat = tau.view(-1)
    gate = Gate(
        tuple(tau.shape),
        torch.arange(len(flat)),
        flat.sign(),
        log_magnitude(flat),
        pristine.view(-1).clone(),
        float(flat.abs().mean()),
    )
    return tau, pristine, gate


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 1000), threshold=st.floats(-3, 4), volume=st.floats(-1, 1), narrowed=st.booleans())
def test_what_is_written_is_what_is_packed(seed: int, threshold: float, volume: float, narrowed: bool) -> None:
    tau, pristine, gate = random_gate(seed)
    gate.volume = volume
    gate.keep(threshold)
    expected = tau.sign() * (log_magnitude(tau) > threshold) * gate.scale  # the definition
    parameter = pristine.clone()
    gate.write(parameter)
    torch.testing.assert_close(parameter, pristine + expected)
    if narrowed:
        gate.narrow()
        assert len(gate.indices) == gate.kept
    packed = gate.pack("w")
    if packed is None:
        assert not expected.any()
        return
    delta = packed.decode("w")
    dense = torch.zeros(tau.numel())
    dense[torch.from_numpy(delta.indices).long()] = torch.from_numpy(delta.levels) * delta.scale
    torch.testing.assert_close(dense.view(tau.shape), expected, rtol=1e-6, atol=0)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), threshold=st.floats(-1, 2))
def test_gains_are_what_autograd_says(seed: int, threshold: float) -> None:
    """Of an entry's gain from growing by a factor, and of the scale's when summed over what is kept."""
    tau, pristine, gate = random_gate(seed)
    gate.keep(threshold)
    weights = torch.randn(tau.shape, generator=torch.Generator().manual_seed(seed + 1))
    factors, volume = torch.zeros(tau.numel(), requires_grad=True), torch.zeros((), requires_grad=True)
    kept = gate.mask.float() * volume.exp() + factors
    (weights.view(-1) * (pristine.view(-1) + gate.sign * gate.scale * kept)).sum().backward()  # type: ignore[no-untyped-call]
    gains = gate.gains(weights)
    assert factors.grad is not None
    assert volume.grad is not None
    torch.testing.assert_close(gains, -factors.grad)
    assert -float(gains[gate.mask].sum()) == pytest.approx(float(volume.grad), rel=1e-3, abs=1e-4)


def test_an_exact_zero_has_the_lowest_score() -> None:
    tau, _, _ = random_gate(0)
    tau[3:] = 0.0
    assert torch.equal(log_magnitude(tau) == LOWEST, tau == 0)


@pytest.mark.parametrize("bits", [500.0, 3_000.0, 12_000.0])
def test_the_threshold_spends_the_budget(bits: float) -> None:
    gates = [random_gate(seed)[2] for seed in range(5)]
    for row, gate in enumerate(gates):
        gate.score += 0.3 * row
    scores = torch.cat([gate.score for gate in gates])
    numels = np.array([gate.numel for gate in gates])
    threshold = threshold_for(scores, np.cumsum([0, *numels]), numels, bits)
    for gate in gates:
        gate.keep(threshold)
    sizes = [gate.pack("w") for gate in gates]
    spent = sum(8 * packed.nbytes for packed in sizes if packed is not None)
    assert spent == pytest.approx(bits, rel=0.1, abs=80)
    expected = [float(bits_of(gate.kept / gate.numel, gate.numel)) for gate in gates]
    assert sum(expected) <= bits
    assert gates[-1].kept > gates[0].kept


def test_a_budget_for_all_keeps_all() -> None:
    _, _, gate = random_gate(0)
    threshold = threshold_for(gate.score, np.array([0, gate.numel]), np.array([gate.numel]), 1e9)
    gate.keep(threshold)
    assert gate.kept == gate.numel


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 1000), count=st.integers(1, 30))
def test_the_projected_step_leaves_the_size_as_it_is(seed: int, count: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    slopes = torch.randn(count, generator=generator, dtype=torch.float64)
    costs = torch.rand(count, generator=generator, dtype=torch.float64)
    assert float(along_the_budget(slopes, costs) @ costs) == pytest.approx(0, abs=1e-9)
    assert torch.equal(along_the_budget(slopes, torch.zeros(count, dtype=torch.float64)), slopes)


def test_bits_of_is_the_entropy_and_signs() -> None:
    assert float(bits_of(0.0, 100)) == pytest.approx(0.0)
    assert float(bits_of(1.0, 100)) == 100.0
    entropy = -(0.1 * math.log2(0.1) + 0.9 * math.log2(0.9))
    assert float(bits_of(0.1, 1000)) == pytest.approx(1000 * (entropy + 0.1), rel=0.02)


@given(density=st.floats(0.001, 0.6), numel=st.integers(1000, 10**8))
def test_density_of_inverts_bits_of(density: float, numel: int) -> None:
    assert density_of(float(bits_of(density, numel)), numel) == pytest.approx(density, rel=1e-4)
    assert density_of(2.0 * numel, numel) == pytest.approx(2 / 3)


def logits(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    pair = torch.randn(2, 6, 11, generator=torch.Generator().manual_seed(seed))
    return pair[0].log_softmax(-1), pair[1].log_softmax(-1)


@pytest.mark.parametrize("loss", list(Loss))
def test_a_student_like_its_teacher_has_no_loss(loss: Loss) -> None:
    student, teacher = logits(0)
    assert float(objective(loss, teacher, teacher)) == pytest.approx(0.0, abs=1e-5)
    assert float(objective(loss, student, teacher)) > 0.1
    shifted = student + torch.randn(6, 1)
    torch.testing.assert_close(objective(loss, shifted, teacher), objective(loss, student, teacher))


def test_alignment_is_the_paper_s_equation() -> None:
    student, teacher = (part - part.mean(-1, keepdim=True) for part in logits(1))
    centre = torch.eye(6) - torch.ones(6, 6) / 6

    def norm(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return torch.linalg.matrix_norm(left.T @ centre @ right)

    expected = 1 - norm(teacher, student) ** 2 / (norm(teacher, teacher) * norm(student, student))
    torch.testing.assert_close(objective(Loss.CKA, student, teacher), expected)


class Small(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name, shape in (("b", (80,)), ("v", (80, 80)), ("w", (80, 80))):
            self.register_parameter(name, torch.nn.Parameter(torch.randn(shape)))


@pytest.fixture
def checkpoints(tmp_path: Path) -> dict[str, Checkpoint]:
    """A base, a fine-tune of its bias alone, and one of everything."""
    torch.manual_seed(0)
    base = {name: value.detach() for name, value in Small().named_parameters()}
    changed = {name: value + 0.01 * torch.randn_like(value) for name, value in base.items()}
    found = {}
    for name, tensors in (("base", base), ("bias", base | {"b": changed["b"]}), ("whole", changed)):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
        found[name] = open_checkpoint(tmp_path / name)
    return found


def test_where_only_biases_differ_there_is_nothing_to_choose(checkpoints: dict[str, Checkpoint]) -> None:
    student = Student(Small(), checkpoints["base"], checkpoints["bias"], ())
    student.choose(0.07)
    assert (student.tensors, student.candidates, student.kept) == (0, 0, 0)
    assert student.pack() == {}
    assert student.tiny.keys() == {"b"}


def test_a_budget_for_nothing_says_so(checkpoints: dict[str, Checkpoint]) -> None:
    for drop in (lambda student: student.settle(2), lambda student: student.narrow(1.0)):
        student = Student(Small(), checkpoints["base"], checkpoints["whole"], ())
        student.choose(0.07)
        with pytest.raises(InvalidRequestError, match="too small to keep anything") as caught:
            drop(student)
        assert caught.value.param == "bits_per_param"
