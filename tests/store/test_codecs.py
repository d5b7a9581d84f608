from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from store.bfloat16 import from_bfloat16, to_bfloat16
from store.codecs.raw import Raw, is_raw
from store.codecs.t_switch import Knob, TSwitch, reference
from store.errors import CheckpointError, InvalidRequestError

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def reconstruct(tau: torch.Tensor, density: float, knob: Knob) -> torch.Tensor:
    packed = TSwitch(density, knob).compress("t", tau)
    if packed is None:
        return torch.zeros(tau.shape)
    delta = packed.decode("t")
    assert delta.shape == tuple(tau.shape)
    dense = torch.zeros(tau.numel())
    dense[torch.from_numpy(delta.indices).long()] = torch.from_numpy(delta.levels).float() * delta.scale
    return dense.view(tau.shape)


@settings(max_examples=200, deadline=None)
@given(
    shape=st.lists(st.integers(0, 12), min_size=0, max_size=4),
    dtype=st.sampled_from(DTYPES),
    density=st.floats(0.001, 1.0),
    knob=st.sampled_from([Knob.RMS, Knob.L1]),
    kind=st.sampled_from(["normal", "ties", "positive", "negative", "zeros", "mostly zero"]),
    seed=st.integers(0, 2**31),
)
def test_the_fast_codec_agrees_with_the_reference(
    shape: list[int], dtype: torch.dtype, density: float, knob: Knob, kind: str, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    tau = torch.randn(shape, generator=generator) * 1e-3
    if kind == "ties":
        tau = torch.randint(-3, 4, shape, generator=generator) * 1e-3
    elif kind in ("positive", "negative"):
        tau = tau.abs() * (1 if kind == "positive" else -1)
    elif kind == "zeros":
        tau = tau * -0.0
    elif kind == "mostly zero":
        tau = tau * (torch.rand(shape, generator=generator) < 0.1)
    tau = tau.to(dtype)
    torch.testing.assert_close(
        reconstruct(tau, density, knob), reference(tau, density, knob), rtol=1e-6, atol=0.0, check_stride=False
    )


def test_each_side_is_trimmed_by_itself_and_ties_stay() -> None:
    tau = torch.tensor([[5.0, 4.0, 3.0, 2.0, -1.0, -1.0, -0.5, 0.0]])
    delta = TSwitch(0.5).compress("t", tau).decode("t")  # type: ignore[union-attr]
    # Two of four positives; one of three negatives, whose tie is kept too.
    assert delta.indices.tolist() == [0, 1, 4, 5]
    assert delta.levels.tolist() == [1, 1, -1, -1]
    assert delta.scale == pytest.approx(((25 + 16 + 1 + 1) / 4) ** 0.5)
    l1 = TSwitch(0.5, Knob.L1).compress("t", tau)
    assert l1 is not None
    assert l1.scale == pytest.approx(16.5 / 4)


def test_strided_input_is_read_in_row_major_order() -> None:
    tau = torch.randn(8, 6, generator=torch.Generator().manual_seed(0)).t()
    torch.testing.assert_close(reconstruct(tau, 0.3, Knob.RMS), reference(tau.contiguous(), 0.3))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("codec", [TSwitch(0.1), Raw()])
def test_broken_deltas_are_refused_by_name(bad: float, codec: TSwitch | Raw) -> None:
    tau = torch.ones(100)
    tau[3] = bad
    with pytest.raises(CheckpointError, match=r"layers\.3\.weight") as caught:
        codec.compress("layers.3.weight", tau)
    assert caught.value.param == "layers.3.weight"


def test_a_scale_beyond_float32_is_refused() -> None:
    with pytest.raises(CheckpointError, match="too large"):
        TSwitch(0.001, Knob.L1).compress("t", torch.full((2000,), 3e38).mul(torch.linspace(0.5, 1, 2000)))
    with pytest.raises(CheckpointError, match="too large"):
        Raw().compress("t", torch.tensor([3.4028e38]))


@pytest.mark.parametrize("density", [0.0, -0.1, 1.1, float("nan")])
def test_density_must_be_a_fraction(density: float) -> None:
    with pytest.raises(InvalidRequestError, match="density"):
        TSwitch(density)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (17,), (3, 5)])
def test_raw_keeps_every_value_to_bfloat16(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tau = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    packed = Raw().compress("t", tau)
    assert packed is not None
    delta = packed.decode("t")
    assert delta.shape == shape
    torch.testing.assert_close(torch.from_numpy(delta.values), tau.bfloat16().float(), rtol=0, atol=0)


def test_raw_skips_what_did_not_change() -> None:
    assert Raw().compress("t", torch.zeros(4)) is None
    assert Raw().compress("t", torch.zeros(0)) is None


def test_which_tensors_are_raw() -> None:
    assert all(is_raw(shape) for shape in [(), (100_000,), (63, 65)])
    assert not is_raw((64, 64))


@settings(max_examples=200, deadline=None)
@given(bits=st.lists(st.integers(0, 2**32 - 1), max_size=50))
def test_bfloat16_rounds_as_torch_does(bits: list[int]) -> None:
    values = np.array(bits, dtype=np.uint32).view(np.float32)
    theirs = torch.from_numpy(values.copy()).bfloat16().float().numpy()
    ours = from_bfloat16(to_bfloat16(values))
    np.testing.assert_array_equal(ours, theirs)
