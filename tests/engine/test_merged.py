"""Merged mode: exact sums, and a base that nothing wears down."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from server.engine import buffers, large_pages
from server.engine.buffers import Buffers
from server.engine.expert import DecodedExpert
from server.engine.kernels import PackedDelta, Term, backend, pack
from server.engine.kernels.merging import merge_tensor, merge_tensor_reference
from server.engine.kernels.types import DenseValues
from server.engine.merged import MergedWeights
from store.deltas import DenseDelta, SparseDelta
from store.mix import BASE_MIX, Mix

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CPU = torch.device("cpu")


def random_sparse(shape: tuple[int, ...], density: float, seed: int, top: int = 1) -> SparseDelta:
    rng = np.random.default_rng(seed)
    indices = np.flatnonzero(rng.random(math.prod(shape)) < density).astype(np.int32)
    levels = rng.integers(1, top + 1, len(indices)) * rng.choice([-1, 1], len(indices))
    return SparseDelta(shape, indices, levels.astype(np.int8), float(np.float32(0.013)))


def random_delta(shape: tuple[int, ...], density: float | None, seed: int) -> PackedDelta:
    """Packed; dense where `density` is None."""
    if density is None:
        return pack(DenseDelta(np.random.default_rng(seed).normal(size=shape).astype(np.float32)), CPU)
    return pack(random_sparse(shape, density, seed), CPU)


def plainly(pristine: torch.Tensor, terms: list[tuple[float, SparseDelta]]) -> torch.Tensor:
    """As `store.apply` merges: from the file's own values, by nothing the engine uses."""
    total = torch.zeros(pristine.numel())
    for weight, delta in terms:
        values = torch.from_numpy(delta.levels).float() * (weight * delta.scale)
        total[torch.from_numpy(delta.indices).long()] += values
    return (pristine.float() + total.view(pristine.shape)).to(pristine.dtype)


@given(
    shape=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    dtype=st.sampled_from(DTYPES),
    densities=st.lists(st.sampled_from([0.0, 0.02, 0.3, 1.0, None]), min_size=1, max_size=4),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=200, deadline=None)
def test_merging_equals_the_reference_bit_for_bit(
    shape: list[int], dtype: torch.dtype, densities: list[float | None], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    pristine = torch.randn(shape, generator=generator).to(dtype)
    terms: list[Term] = [
        (float(torch.randn((), generator=generator)), random_delta(tuple(shape), density, seed + k))
        for k, density in enumerate(densities)
    ]
    out = torch.full_like(pristine, float("nan"))
    merge_tensor(out, pristine, terms)
    assert torch.equal(out, merge_tensor_reference(pristine, terms))


@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 70)),
    dtype=st.sampled_from(DTYPES),
    densities=st.lists(st.sampled_from([0.0, 0.02, 0.3, 1.0]), min_size=1, max_size=3),
    top=st.sampled_from([1, 3, 13]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=100, deadline=None)
def test_merging_from_packed_form_equals_merging_the_file(
    shape: tuple[int, int], dtype: torch.dtype, densities: list[float], top: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    pristine = torch.randn(shape, generator=generator).to(dtype)
    terms = [
        (float(torch.randn((), generator=generator)), random_sparse(shape, density, seed + k, top))
        for k, density in enumerate(densities)
    ]
    out = torch.full_like(pristine, float("nan"))
    merge_tensor(out, pristine, [(weight, pack(delta, CPU)) for weight, delta in terms])
    assert torch.equal(out, plainly(pristine, terms))


def make_library(parameters: dict[str, nn.Parameter]) -> dict[str, DecodedExpert]:
    library = {}
    for k in range(6):
        tensors: dict[str, PackedDelta] = {}
        for seed, (name, parameter) in enumerate(parameters.items()):
            if parameter.ndim == 1 or k % 3 or name != "c":
                density = None if parameter.ndim == 1 else 0.1
                tensors[name] = random_delta(tuple(parameter.shape), density, 100 * k + seed)
        library[f"expert{k}"] = DecodedExpert(f"expert{k}", tensors)
    misshapen = DenseValues(torch.zeros(7))  # fails when it is applied, as an exhausted device would
    library["broken"] = DecodedExpert("broken", {**library["expert1"].tensors, "c": misshapen})
    return library


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mixes", [0, 1, 2.5, 6])
def test_the_base_survives_two_hundred_random_patches_and_failures(dtype: torch.dtype, mixes: float) -> None:
    """However many mixes are kept; each is what it is when built alone, and memory holds."""
    torch.manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {"a": (31, 17), "b": (17,), "c": (64, 33)}
    parameters = {n: nn.Parameter(torch.randn(s).to(dtype), requires_grad=False) for n, s in shapes.items()}
    whole = sum(parameter.nbytes for parameter in parameters.values())
    merged = MergedWeights(parameters, backend("auto", CPU), int(mixes * whole))
    assert merged.room == max(1, int(mixes))
    fresh = {n: nn.Parameter(parameter.data, requires_grad=False) for n, parameter in parameters.items()}
    at_load = merged.pristine_fingerprint()
    assert merged.fingerprint() == at_load
    library = make_library(parameters)
    rng = random.Random(0)
    failures = 0
    known: list[Mix] = []
    for _ in range(200):
        chosen = rng.sample(sorted(library), rng.randint(0, 3))
        mix = Mix.of({digest: rng.uniform(-2, 2) for digest in chosen})
        if known and rng.random() < 0.5:
            mix = rng.choice(known[-5:])
        known.append(mix)
        try:
            merged.apply(mix, library)
            assert merged.current == mix
            assert (merged.fingerprint() == at_load) == mix.is_base
            alone = MergedWeights(fresh, backend("auto", CPU))
            alone.apply(mix, library)
            assert merged.fingerprint() == alone.fingerprint()
            alone.apply(BASE_MIX, {})
        except (RuntimeError, ValueError):
            failures += 1
            assert merged.current == BASE_MIX
            assert merged.fingerprint() == at_load
        assert merged.pristine_fingerprint() == at_load
        assert merged.used_bytes <= max(1, mixes) * whole
    assert failures > 20
    merged.apply(BASE_MIX, {})
    assert merged.fingerprint() == at_load


def test_an_expert_leaves_nothing_behind_for_the_next() -> None:
    parameters = {"w": nn.Parameter(torch.zeros(4, 4), requires_grad=False)}
    merged = MergedWeights(parameters, backend("auto", CPU))
    one = SparseDelta((4, 4), np.array([0, 5], np.int32), np.array([1, -1], np.int8), 2.0)
    two = SparseDelta((4, 4), np.array([7], np.int32), np.array([1], np.int8), 3.0)
    library = {name: DecodedExpert(name, {"w": pack(delta, CPU)}) for name, delta in (("one", one), ("two", two))}
    merged.apply(Mix.of({"one": 1.0}), library)
    merged.apply(Mix.of({"two": 0.5}), library)
    expected = torch.zeros(16)
    expected[7] = 1.5
    assert torch.equal(parameters["w"].view(-1), expected)
    assert merged.switches == 2


def test_going_back_to_the_last_mix_needs_no_patch() -> None:
    parameters = {"w": nn.Parameter(torch.randn(40, 33), requires_grad=False)}
    merged = MergedWeights(parameters, backend("auto", CPU))
    mix = Mix.of({"one": 1.0})
    library = {"one": DecodedExpert("one", {"w": random_delta((40, 33), 0.3, 0)})}
    merged.apply(mix, library)
    patched = merged.fingerprint()
    merged.apply(BASE_MIX, library)
    assert merged.fingerprint() == merged.pristine_fingerprint()
    merged.apply(mix, library)
    assert merged.fingerprint() == patched != merged.pristine_fingerprint()
    assert (merged.patches, merged.switches) == (1, 3)


def test_mixes_that_have_room_are_built_once_and_the_one_used_longest_ago_goes() -> None:
    parameters = {"w": nn.Parameter(torch.randn(40, 33), requires_grad=False)}
    library = {name: DecodedExpert(name, {"w": random_delta((40, 33), 0.3, ord(name))}) for name in "abc"}
    a, b, c = (Mix.of({name: 1.0}) for name in "abc")
    merged = MergedWeights(parameters, backend("auto", CPU), 2 * parameters["w"].nbytes)
    for mix in (a, b, a, b, a):
        merged.apply(mix, library)
    assert merged.patches == 2
    merged.apply(c, library)
    assert merged.built == (a, c)
    merged.apply(a, library)
    assert (merged.patches, merged.built) == (3, (c, a))


def test_memory_that_runs_out_half_way_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """What had been taken for a mix before there was no more is there for the next one."""
    parameters = {name: nn.Parameter(torch.randn(40, 33), requires_grad=False) for name in "abc"}
    tensors = {name: random_delta((40, 33), 0.3, ord(name)) for name in parameters}
    library = {name: DecodedExpert(name, tensors) for name in ("one", "two")}
    merged = MergedWeights(parameters, backend("auto", CPU))
    empty_like, left = torch.empty_like, [2]

    def scarce(tensor: torch.Tensor) -> torch.Tensor:
        left[0] -= 1
        if left[0] < 0:
            raise torch.OutOfMemoryError
        return empty_like(tensor)

    with monkeypatch.context() as patch:
        patch.setattr(buffers, "_in_host_memory", lambda _tensors: False)  # one by one, as on a GPU
        patch.setattr(torch, "empty_like", scarce)
        for _ in range(3):
            with pytest.raises(torch.OutOfMemoryError):
                merged.apply(Mix.of({"one": 1.0}), library)
    merged.apply(Mix.of({"two": 1.0}), library)
    assert merged.used_bytes == sum(parameter.nbytes for parameter in parameters.values())


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_buffers_keep_their_budget_and_never_lie_in_each_other(data: st.DataObject) -> None:
    """However many parameters each taker wants, and however many share their memory."""
    shapes = data.draw(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 9)), min_size=1, max_size=6))
    like = {str(i): torch.empty(shape, dtype=(torch.float32, torch.bfloat16)[i % 2]) for i, shape in enumerate(shapes)}
    whole = sum(tensor.nbytes for tensor in like.values())
    budget = whole + data.draw(st.integers(0, 2 * whole))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(large_pages, "_TOGETHER", data.draw(st.integers(1, 2000)))
        kept = Buffers(like, budget)
        held: list[tuple[int, dict[str, torch.Tensor]]] = []
        for mark in range(data.draw(st.integers(1, 12))):
            names = data.draw(st.lists(st.sampled_from(sorted(like)), unique=True))
            while not kept.make_room(names) and held:
                kept.put_back(held.pop(0)[1])
            taken = kept.take(names)
            assert list(taken) == names
            assert kept.used_bytes <= budget
            for name, buffer in taken.items():
                assert (buffer.shape, buffer.dtype) == (like[name].shape, like[name].dtype)
                buffer.fill_(mark)
            held.append((mark, taken))
            for earlier, others in held:
                assert all(bool((buffer == earlier).all()) for buffer in others.values())
        for _, others in held:
            kept.put_back(others)
        kept.take(like)
        assert kept.used_bytes <= budget
