from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from store.card import Card
from store.errors import InvalidRequestError, WrongBaseError
from store.expert_file import digest_of, read_deltas, validate
from store.merge_methods import MergeSettings, Method, dare, merger, ram, shared_ratio, shares, ties
from store.merging import merge_experts
from tests.store.builders import SHAPES, base_manifest, packed_newer, write_sample

VALUES = st.sampled_from([-2.0, -1.0, 0.0, 0.0, 1.0, 3.0])
TAUS = st.integers(2, 4).flatmap(
    lambda count: st.lists(st.lists(VALUES, min_size=count, max_size=count), min_size=1, max_size=30)
)


def array(rows: list[list[float]]) -> np.ndarray:
    return np.array(rows, dtype=np.float32).T


@settings(max_examples=100, deadline=None)
@given(rows=TAUS)
def test_ties_entry_by_entry(rows: list[list[float]]) -> None:
    expected = []
    for row in rows:
        total = sum(row)
        chosen = [value for value in row if value * total > 0]
        expected.append(sum(chosen) / len(chosen) if chosen else 0.0)
    np.testing.assert_allclose(ties(array(rows)), expected, rtol=1e-6)


@settings(max_examples=100, deadline=None)
@given(rows=TAUS, method=st.sampled_from(["ram", "ram-plus", "ram-plus-changed", "ram-plus-tensor"]))
def test_ram_entry_by_entry(rows: list[list[float]], method: str) -> None:
    count = len(rows[0])
    shared = [sum(row[k] != 0 and sum(v != 0 for v in row) > 1 for row in rows) for k in range(count)]
    alone = [sum(row[k] != 0 and sum(v != 0 for v in row) == 1 for row in rows) for k in range(count)]
    raised = []
    for k in range(count):
        unique = shared[k] / alone[k] if alone[k] else 0.0
        changed = shared[k] / (shared[k] + alone[k]) if shared[k] + alone[k] else 0.0
        raised.append(
            {
                "ram": 1.0,
                "ram-plus": 1 + 0.2 * min(1.0, unique),
                "ram-plus-changed": 1 + 0.2 * changed,
                "ram-plus-tensor": 1 + 0.1 * min(0.2, unique),
            }[method]
        )
    expected = []
    for row in rows:
        changers = [k for k, value in enumerate(row) if value != 0]
        mean = sum(row) / max(1, len(changers))
        expected.append(mean * raised[changers[0]] if len(changers) == 1 else mean)
    taus = array(rows)
    merge = merger(MergeSettings(method=Method(method)), lambda: iter([taus]))
    np.testing.assert_allclose(merge("w", taus), expected, rtol=1e-5)


def test_counts_run_over_all_tensors() -> None:
    tensors = [array([[1.0, 1.0], [1.0, 0.0]]), array([[0.0, 2.0], [2.0, 2.0], [2.0, 0.0], [0.0, 1.0]])]
    assert sum(shares(taus) for taus in tensors).tolist() == [[2, 2], [2, 2]]
    assert shared_ratio(np.array([[4, 2], [0, 0], [3, 0]])).tolist() == [2.0, 0.0, 0.0]
    merge = merger(MergeSettings(method=Method.RAM_PLUS), lambda: iter(tensors))
    np.testing.assert_allclose(merge("w", tensors[0]), [1.0, 1.2], rtol=1e-6)


def test_dare_keeps_the_mean_and_its_seed() -> None:
    taus = np.ones((2, 200_000), dtype=np.float32)
    first, again = (dare(taus, 0.9, np.random.default_rng(3)) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert first.mean() == pytest.approx(2.0, abs=0.05)
    assert (first == 0).mean() == pytest.approx(0.81, abs=0.01)
    assert set(np.round(np.unique(first)).tolist()) == {0.0, 10.0, 20.0}
    np.testing.assert_allclose(ram(taus, np.ones(2)), 1.0)


@pytest.mark.parametrize("method", [method for method in Method if method is not Method.ATLAS])
def test_the_result_is_an_expert(tmp_path: Path, method: Method) -> None:
    paths = [(write_sample(tmp_path / "a", seed=1), 1.0), (write_sample(tmp_path / "b", tensors=packed_newer(2)), -0.5)]
    settings_ = MergeSettings(method=method)
    header = merge_experts(paths, base_manifest(), tmp_path / "m", settings_, name="both")
    assert validate(tmp_path / "m", base_manifest()) == header
    assert header.codec_params["method"] == method.value
    merge_experts(paths, base_manifest(), tmp_path / "again", settings_, name="both")
    assert (tmp_path / "m").read_bytes() == (tmp_path / "again").read_bytes()
    assert header.tensors.keys() == SHAPES.keys()


def test_the_result_names_its_parents(tmp_path: Path) -> None:
    one, two = write_sample(tmp_path / "one", 0), write_sample(tmp_path / "two", 1)
    card = Card(author="ada", parents=("f" * 64,))
    header = merge_experts(
        [(one, 1.0), (two, 0.5), (one, 0.5)], base_manifest(), tmp_path / "m", MergeSettings(), card=card
    )
    assert header.card == Card(author="ada", parents=(digest_of(one), digest_of(two)))


def test_a_sum_is_the_sum(tmp_path: Path) -> None:
    paths = [
        (write_sample(tmp_path / name, seed=seed), weight) for name, seed, weight in [("a", 1, 1.0), ("b", 2, -0.5)]
    ]
    merge_experts(paths, base_manifest(), tmp_path / "m", MergeSettings(Method.TASK_ARITHMETIC, strength=2.0))
    merged = dict(read_deltas(tmp_path / "m", base_manifest()))
    for name, shape in SHAPES.items():
        expected = np.zeros(int(np.prod(shape)), dtype=np.float64)
        for path, weight in paths:
            expected += 2.0 * weight * dense(dict(read_deltas(path, base_manifest()))[name])
        top = np.abs(expected).max()
        np.testing.assert_allclose(dense(merged[name]), expected, atol=top / 200)


def dense(delta: object) -> np.ndarray:
    if hasattr(delta, "values"):
        return np.asarray(delta.values).reshape(-1)
    values = np.zeros(int(np.prod(delta.shape)))  # type: ignore[attr-defined]
    values[delta.indices] = delta.levels * delta.scale  # type: ignore[attr-defined]
    return values


@pytest.mark.parametrize(("weight", "strength", "factor"), [(-1.0, None, -1.0), (-0.5, None, -0.5), (-1.0, 0.3, -0.3)])
def test_one_expert_is_negated(tmp_path: Path, weight: float, strength: float | None, factor: float) -> None:
    """Unlearning: base − τ, with no other expert, and with the weight as it was given."""
    path = write_sample(tmp_path / "a", seed=1)
    given = MergeSettings(Method.TASK_ARITHMETIC, strength=strength)
    header = merge_experts([(path, weight)], base_manifest(), tmp_path / "m", given)
    assert (header.codec_params["experts"], header.card.parents) == (1, (digest_of(path),))
    own, merged = dict(read_deltas(path, base_manifest())), dict(read_deltas(tmp_path / "m", base_manifest()))
    for name in SHAPES:
        expected = factor * dense(own[name])
        np.testing.assert_allclose(dense(merged[name]), expected, atol=np.abs(expected).max() / 200)


def test_what_cannot_be_merged(tmp_path: Path) -> None:
    sample = write_sample(tmp_path / "a")
    sum_of = MergeSettings(Method.TASK_ARITHMETIC)
    for one, how in (([(sample, 1.0)], sum_of), ([(sample, -1.0)], MergeSettings()), ([], sum_of)):
        with pytest.raises(InvalidRequestError, match=r"two experts or more .* FILE=-1 takes") as caught:
            merge_experts(one, base_manifest(), tmp_path / "m", how)
        assert caught.value.param == "experts"
    with pytest.raises(InvalidRequestError, match="drop"):
        merge_experts([(sample, 1.0)] * 2, base_manifest(), tmp_path / "m", MergeSettings(Method.DARE, drop=1.0))
    with pytest.raises(WrongBaseError):
        merge_experts([(sample, 1.0)] * 2, base_manifest(1), tmp_path / "m", MergeSettings())
