"""Merged mode: exact sums, and a base that nothing wears down."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from server.engine.merged import (
    DecodedExpert,
    ExpertTensor,
    MergedWeights,
    SparseWeights,
    merge_tensor,
    merge_tensor_reference,
)
from store.mix import BASE_MIX, Mix

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random_delta(numel: int, density: float, generator: torch.Generator, *, wide: bool = False) -> SparseWeights:
    indices = (torch.rand(numel, generator=generator) < density).nonzero().view(-1)
    levels = torch.randint(0, 2, indices.shape, generator=generator).mul(2).sub(1).to(torch.int8)
    return SparseWeights(indices if wide else indices.int(), levels, 0.013)


@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    dtype=st.sampled_from(DTYPES),
    densities=st.lists(st.sampled_from([0.0, 0.05, 0.5, 1.0, None]), min_size=1, max_size=4),
    seed=st.integers(0, 2**31),
    wide=st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_merging_equals_the_reference_bit_for_bit(
    shape: list[int], dtype: torch.dtype, densities: list[float | None], seed: int, wide: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    pristine = torch.randn(shape, generator=generator).to(dtype)
    terms: list[tuple[float, ExpertTensor]] = []
    for density in densities:
        weight = float(torch.randn((), generator=generator))
        if density is None:
            terms.append((weight, torch.randn(shape, generator=generator)))
        else:
            terms.append((weight, random_delta(pristine.numel(), density, generator, wide=wide)))
    out = torch.full_like(pristine, float("nan"))
    merge_tensor(out, pristine, terms)
    assert torch.equal(out, merge_tensor_reference(pristine, terms))


class Poison(SparseWeights):
    """A delta that fails when it is applied, as a broken expert or an exhausted device would."""

    def values(self, weight: float) -> torch.Tensor:
        raise RuntimeError("injected failure")


def make_library(parameters: dict[str, nn.Parameter]) -> dict[str, DecodedExpert]:
    generator = torch.Generator().manual_seed(0)
    library = {}
    for k in range(6):
        tensors: dict[str, ExpertTensor] = {}
        for name, parameter in parameters.items():
            if parameter.ndim == 1:
                tensors[name] = torch.randn(parameter.shape, generator=generator)
            elif k % 3 or name != "c":
                tensors[name] = random_delta(parameter.numel(), 0.1, generator)
        library[f"expert{k}"] = DecodedExpert(f"expert{k}", tensors)
    broken = Poison(torch.zeros(1, dtype=torch.int32), torch.ones(1, dtype=torch.int8), 1.0)
    library["broken"] = DecodedExpert("broken", {**library["expert1"].tensors, "c": broken})
    return library


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_base_survives_two_hundred_random_patches_and_failures(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {"a": (31, 17), "b": (17,), "c": (64, 33)}
    parameters = {n: nn.Parameter(torch.randn(s).to(dtype), requires_grad=False) for n, s in shapes.items()}
    merged = MergedWeights(parameters)
    at_load = merged.pristine_fingerprint()
    assert merged.fingerprint() == at_load
    library = make_library(parameters)
    rng = random.Random(0)
    failures = 0
    for _ in range(200):
        chosen = rng.sample(sorted(library), rng.randint(0, 3))
        mix = Mix.of({digest: rng.uniform(-2, 2) for digest in chosen})
        try:
            merged.apply(mix, library)
            assert merged.current == mix
            assert (merged.fingerprint() == at_load) == mix.is_base
        except RuntimeError:
            failures += 1
            assert merged.current == BASE_MIX
            assert merged.fingerprint() == at_load
        assert merged.pristine_fingerprint() == at_load
    assert failures > 20
    merged.apply(BASE_MIX, {})
    assert merged.fingerprint() == at_load


def test_an_expert_leaves_nothing_behind_for_the_next() -> None:
    parameters = {"w": nn.Parameter(torch.zeros(4, 4), requires_grad=False)}
    merged = MergedWeights(parameters)
    one = SparseWeights(torch.tensor([0, 5], dtype=torch.int32), torch.tensor([1, -1], dtype=torch.int8), 2.0)
    two = SparseWeights(torch.tensor([7], dtype=torch.int32), torch.tensor([1], dtype=torch.int8), 3.0)
    library = {"one": DecodedExpert("one", {"w": one}), "two": DecodedExpert("two", {"w": two})}
    merged.apply(Mix.of({"one": 1.0}), library)
    merged.apply(Mix.of({"two": 0.5}), library)
    expected = torch.zeros(16)
    expected[7] = 1.5
    assert torch.equal(parameters["w"].view(-1), expected)
    assert merged.switches == 2
