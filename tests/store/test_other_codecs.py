"""ComPEFT, BitDelta, low rank and quantised against plain PyTorch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from store.codecs.bit_delta import BitDelta
from store.codecs.compeft import ComPEFT
from store.codecs.low_rank import LowRank, factors
from store.codecs.quantised import Quantised
from store.codecs.t_switch import TSwitch
from store.deltas import Delta, DenseDelta
from store.errors import CheckpointError, InvalidRequestError

SEEDS = st.integers(0, 2**31)


def sample(seed: int, *shape: int, zeros: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator) ** 3 * 0.01
    return values * (torch.rand(shape, generator=generator) >= zeros)


def dense(delta: Delta) -> torch.Tensor:
    if isinstance(delta, DenseDelta):
        return torch.from_numpy(delta.values)
    values = torch.zeros(int(np.prod(delta.shape)))
    values[torch.from_numpy(delta.indices).long()] = torch.from_numpy(delta.levels).float() * delta.scale
    return values.view(delta.shape)


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS, rows=st.integers(1, 30), zeros=st.sampled_from([0.0, 0.3, 1.0]))
def test_bit_delta_is_sign_times_mean(seed: int, rows: int, zeros: float) -> None:
    tau = sample(seed, rows, 17, zeros=zeros)
    packed = BitDelta().compress("w", tau)
    if packed is None:
        assert not tau.any()
        return
    expected = tau.sign() * tau.abs().sum() / tau.count_nonzero()
    torch.testing.assert_close(dense(packed.decode("w")), expected, rtol=1e-5, atol=0)


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS, density=st.floats(0.01, 1.0), strength=st.floats(0.5, 4.0))
def test_compeft_keeps_the_largest_of_all_at_one_scale(seed: int, density: float, strength: float) -> None:
    taus = {"a": sample(seed, 30, 40), "b": 3 * sample(seed + 1, 25, 16)}
    codec = ComPEFT(taus.items(), density, strength)
    flat = torch.cat([tau.view(-1) for tau in taus.values()])
    found = {name: codec.compress(name, tau) for name, tau in taus.items()}
    result = torch.cat(
        [
            torch.zeros(taus[name].numel()) if packed is None else dense(packed.decode(name)).view(-1)
            for name, packed in found.items()
        ]
    )
    kept = result != 0
    assert int(kept.sum()) >= int(density * len(flat))
    assert int(kept.sum()) <= 1.03 * density * len(flat) + 2  # what falls into the threshold's bin is kept
    assert not kept.any() or flat[kept].abs().min() >= flat[~kept].abs().max() if bool((~kept).any()) else True
    expected = flat.sign() * kept * strength * flat.double().std(correction=0).float()
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("density", [0.001, 0.2, 0.3, 0.4, 1.0])
def test_compeft_keeps_ties_as_t_switch_does(density: float) -> None:
    """Fine-tunes in bfloat16 differ from their base by few magnitudes; a class of them is kept whole."""
    signs = torch.where(torch.arange(1000) % 2 == 0, 1.0, -1.0)
    equal = signs * 2**-10
    classes = signs * torch.where(torch.arange(1000) % 20 < 6, 2**-9, 2**-10)
    for tau, wanted in ((equal, 1000), (classes, 300 if density <= 0.3 else 1000)):
        found = ComPEFT([("w", tau)], density).compress("w", tau)
        switched = TSwitch(max(density, 0.01)).compress("w", tau)
        assert found is not None
        assert switched is not None
        assert found.nnz == switched.nnz == wanted
    zeros = torch.zeros(1000)
    zeros[:3] = 1e-3
    sparse = ComPEFT([("w", zeros)], density).compress("w", zeros)
    assert sparse is not None
    assert sparse.nnz == 3


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS, rank=st.integers(1, 6))
def test_low_rank_is_as_good_as_the_svd(seed: int, rank: int) -> None:
    matrix = sample(seed, 40, 6) @ sample(seed + 1, 6, 50) + 1e-6 * sample(seed + 2, 40, 50)
    left, right = factors(matrix, rank)
    assert (left.shape, right.shape) == ((40, rank), (rank, 50))
    values = torch.linalg.svdvals(matrix)
    best = values[rank:].norm()
    assert (matrix - left @ right).norm() <= 1.01 * best + 1e-5 * values[0]
    packed = LowRank(rank).compress("w", matrix)
    assert packed is not None
    assert packed.nbytes == 2 * rank * 90
    torch.testing.assert_close(dense(packed.decode("w")), left @ right, rtol=0, atol=0.02 * float(values[0]))


def test_low_rank_leaves_the_rest_raw() -> None:
    tau = sample(0, 7)
    packed = LowRank(4).compress("norm", tau)
    assert packed is not None
    torch.testing.assert_close(dense(packed.decode("norm")), tau.bfloat16().float(), rtol=0, atol=0)
    wide = LowRank(4).compress("w", sample(0, 5, 5))
    assert wide is not None
    assert wide.kind == "dense"
    assert LowRank(1).compress("w", torch.zeros(9, 9)) is None


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS, top=st.integers(1, 127), zeros=st.sampled_from([0.0, 0.5, 1.0]))
def test_quantised_is_within_half_a_level(seed: int, top: int, zeros: float) -> None:
    tau = sample(seed, 57, zeros=zeros)
    packed = Quantised(top).compress("norm", tau)
    if packed is None:
        assert not tau.any()
        return
    result = dense(packed.decode("norm"))
    assert (result - tau).abs().max() <= (0.5 + 1e-4) * tau.abs().max() / top
    assert float(result.abs().max()) == pytest.approx(float(tau.abs().max()), rel=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_deltas_are_named(value: float) -> None:
    tau = torch.ones(8, 8)
    tau[2, 2] = value
    for codec in (BitDelta(), LowRank(1), Quantised()):
        with pytest.raises(CheckpointError, match="layer"):
            codec.compress("layer", tau)
    with pytest.raises(CheckpointError, match="layer"):
        ComPEFT([("layer", tau)], 0.1)


def test_settings_out_of_range() -> None:
    for make in (lambda: Quantised(0), lambda: Quantised(128), lambda: LowRank(0), lambda: ComPEFT([], 0.0)):
        with pytest.raises(InvalidRequestError):
            make()
