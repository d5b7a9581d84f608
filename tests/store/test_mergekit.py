"""Our merges next to mergekit's own, wherever it offers the same method. Where both differ, the test says how."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mergekit.merge_methods import merge_tensors

from store.expert_file import read_deltas
from store.merge_methods import MergeSettings, Method, dare, merger
from store.merging import merge_experts
from tests.store.builders import base_manifest, packed_newer, write_sample
from tests.store.test_merging import dense

VALUES = st.sampled_from([-2.0, -1.0, 0.0, 0.0, 0.5, 1.0, 3.0])
TAUS = st.integers(2, 4).flatmap(
    lambda count: st.lists(st.lists(VALUES, min_size=24, max_size=24), min_size=count, max_size=count)
)


def theirs(taus: np.ndarray, method: str, **parameters: object) -> np.ndarray:
    """What mergekit makes of base + τ_k, less the base. The base's numbers and the sums are exact in float32."""
    base = torch.arange(taus.shape[1], dtype=torch.float32).view(4, -1)
    tuned = [base + torch.from_numpy(tau).view_as(base) for tau in taus]
    merged = merge_tensors([base, *tuned], method, parameters=parameters, base_index=0)
    return (merged - base).reshape(-1).numpy()


def ours(taus: np.ndarray, method: Method) -> np.ndarray:
    merge = merger(MergeSettings(method), lambda: iter([taus]))
    return merge("weight", taus)


def array(rows: list[list[float]]) -> np.ndarray:
    return np.array(rows, dtype=np.float32)


@settings(max_examples=50, deadline=None)
@given(rows=TAUS, weights=st.lists(st.sampled_from([0.25, 0.5, 1.0, 2.0]), min_size=4, max_size=4))
def test_task_arithmetic_is_mergekit_s_with_any_weights(rows: list[list[float]], weights: list[float]) -> None:
    taus = array(rows)
    own = np.array(weights[: len(taus)], dtype=np.float32)
    expected = theirs(taus, "task_arithmetic", weight=own.tolist())
    np.testing.assert_allclose(ours(own[:, None] * taus, Method.TASK_ARITHMETIC), expected, atol=1e-5)


@settings(max_examples=50, deadline=None)
@given(rows=TAUS)
def test_ties_is_mergekit_s_but_where_both_signs_weigh_the_same(rows: list[list[float]]) -> None:
    """There mergekit takes the positive side, and we change nothing. Density 1: our experts are trimmed already."""
    taus = array(rows)
    found, expected = ours(taus, Method.TIES), theirs(taus, "ties", weight=1.0)
    tied = taus.sum(axis=0) == 0
    np.testing.assert_allclose(found[~tied], expected[~tied], atol=1e-5)
    assert not found[tied].any()
    assert (expected[tied] >= 0).all()


@pytest.mark.parametrize(("method", "name"), [(Method.RAM, "ram"), (Method.RAM_PLUS_TENSOR, "ramplus_tl")])
@settings(max_examples=50, deadline=None)
@given(rows=TAUS)
def test_ram_is_mergekit_s(rows: list[list[float]], method: Method, name: str) -> None:
    """But for an expert whose entries are all shared: mergekit raises the factor of entries that are none."""
    taus = array(rows)
    np.testing.assert_allclose(ours(taus, method), theirs(taus, name), atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), drop=st.sampled_from([0.25, 0.5, 0.75]))
def test_dare_is_mergekit_s_for_the_same_draw(seed: int, drop: float) -> None:
    """Same entries dropped, the rest raised: by 1 / (1 − drop) here, as the paper has it; to the whole's old L1 norm in
    mergekit, which is the same on average. With entries of one size that is by how many were really dropped."""
    taus = np.random.default_rng(seed).choice(np.array([-1.0, 1.0], dtype=np.float32), (1, 24))
    mine = dare(taus, drop, np.random.default_rng(seed))
    kept = mine != 0
    if not kept.any():
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "bernoulli", lambda _: torch.from_numpy(kept).float().view(4, -1))
        expected = theirs(taus, "dare_linear", weight=1.0, density=1 - drop)
    np.testing.assert_allclose(mine * (1 - drop) / kept.mean(), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("method", "name"), [(Method.TASK_ARITHMETIC, "task_arithmetic"), (Method.TIES, "ties"), (Method.RAM, "ram")]
)
def test_files_merge_to_what_mergekit_makes_of_the_models(tmp_path: Path, method: Method, name: str) -> None:
    """Whole expert files, decoded, within half a step of the levels, or the bfloat16, that the result is stored in."""
    base = base_manifest()
    files = [write_sample(tmp_path / str(seed), seed, packed_newer(seed)) for seed in (1, 2, 3)]
    merge_experts([(file, 1.0) for file in files], base, tmp_path / "merged", MergeSettings(method, strength=1.0))
    result = dict(read_deltas(tmp_path / "merged", base))
    sources = [dict(read_deltas(file, base)) for file in files]
    assert result
    for tensor in set().union(*sources):
        numel = int(np.prod(base.tensors[tensor], dtype=np.int64))
        taus = np.stack([dense(source[tensor]) if tensor in source else np.zeros(numel) for source in sources])
        zeros = torch.zeros(numel, dtype=torch.float64)
        models = [zeros, *(torch.from_numpy(tau).double() for tau in taus)]
        parameters = {} if name == "ram" else {"weight": 1.0}
        expected = merge_tensors(models, name, parameters=parameters, base_index=0).numpy()
        same = (taus.sum(axis=0) != 0) if name == "ties" else np.ones(numel, dtype=bool)
        found = dense(result[tensor]) if tensor in result else np.zeros(numel)
        largest = np.abs(expected[same]).max(initial=0.0)
        np.testing.assert_allclose(found[same], expected[same], atol=largest * (0.51 / 127 + 2**-8))
