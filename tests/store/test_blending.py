"""aTLAS: coefficients per expert and tensor, learned from what the experts answer to their own exemplars."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from store import blending, teacher
from store.blending import Blend, _Student, learn_blend
from store.card import Card
from store.checkpoint import open_checkpoint
from store.convert import compress
from store.errors import CheckpointError, InvalidRequestError
from store.expert_file import digest_of, read_deltas
from store.fingerprint import manifest_of
from store.merge_methods import MergeSettings, Method
from store.merging import merge_experts
from store.overwriting import as_float_delta
from store.teacher import listen, load_model
from tests.tiny import save_base, save_tuned

PROMPTS = [[f"the river {number} is" for number in range(6)], [f"say {number} words" for number in range(6)]]
SETTINGS = MergeSettings(Method.ATLAS, shots=6)


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher, "MAX_NEW_TOKENS", 5)
    monkeypatch.setattr(blending, "EPOCHS", 6)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def experts(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two that are sparse but for their norms."""
    folder = tmp_path_factory.mktemp("experts")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teacher, "MAX_NEW_TOKENS", 5)
        for seed, prompts in enumerate(PROMPTS, start=1):
            tuned = save_tuned(base, folder / f"tuned-{seed}", seed=seed, scale=0.03)
            compress(base, tuned, folder / str(seed), density=0.3, knob="l1", exemplars=prompts)
    return [folder / "1", folder / "2"]


def deltas(file: Path, base: Path) -> dict[str, np.ndarray]:
    weights = open_checkpoint(base)
    return {name: as_float_delta(delta, weights, name) for name, delta in read_deltas(file, manifest_of(base, None))}


def test_slopes_are_those_of_the_loss(base: Path, experts: list[Path]) -> None:
    """Against differences of the loss itself, for a matrix that both change, and for the tied embedding."""
    checkpoint = open_checkpoint(base)
    sources = [deltas(file, base) for file in experts]
    model, tokenizer = load_model(base)
    model = model.float()
    student = _Student(model, checkpoint, sources)
    student.write(student.alone(0))
    [lesson, *_] = listen(model, tokenizer, PROMPTS[0])
    at = torch.full(student.shape, 0.4, dtype=torch.float64)
    student.write(at)
    with student:
        lesson.kl(model).backward()
        slopes = student.slopes.clone()
    for name in ("model.layers.1.mlp.down_proj.weight", "model.embed_tokens.weight", "model.norm.weight"):
        column = student.names.index(name)
        for row in range(2):
            found = []
            for step in (-0.01, 0.01):
                moved = at.clone()
                moved[row, column] += step
                student.write(moved)
                found.append(float(lesson.kl(model)))
            assert slopes[row, column] == pytest.approx((found[1] - found[0]) / 0.02, rel=0.05, abs=0.02)


def test_the_same_expert_twice_is_itself(base: Path, experts: list[Path]) -> None:
    """Half of it each would do: the coefficients of the two grow together, towards a sum of one."""
    one = deltas(experts[0], base)
    blend = learn_blend(base, open_checkpoint(base), [one, one], [PROMPTS[0], PROMPTS[0]])
    sums = [blend.weights[0][name] + blend.weights[1][name] for name in one]
    assert np.mean(sums) > 2 * blending.START + 0.1
    assert blend.kl < 0.5 * blend.kl_at_start


def test_the_file_holds_what_was_learned(base: Path, experts: list[Path], tmp_path: Path) -> None:
    weights, manifest = open_checkpoint(base), manifest_of(base, None)
    steps: list[tuple[int, int]] = []
    pairs = [(file, 1.0) for file in experts]
    header = merge_experts(
        pairs, manifest, tmp_path / "m", SETTINGS, weights=weights, progress=lambda *step: steps.append(step)
    )
    assert steps[-1][0] == steps[-1][1]
    assert header.card == Card(parents=tuple(map(digest_of, experts)))
    sources = [deltas(file, base) for file in experts]
    blend = learn_blend(base, weights, sources, PROMPTS)
    assert header.codec_params["kl"] == blend.kl < blend.kl_at_start == header.codec_params["kl_at_start"]
    assert len({round(value, 3) for row in blend.weights for value in row.values()}) > 10, "each has its own"
    merged = deltas(tmp_path / "m", base)
    for name in merged:
        expected = sum(row[name] * source[name] for row, source in zip(blend.weights, sources, strict=True))
        top = np.abs(expected).max()
        np.testing.assert_allclose(merged[name], expected, atol=top * (0.51 / 127 + 2**-8))
    merge_experts(pairs, manifest, tmp_path / "again", SETTINGS, weights=weights)
    assert (tmp_path / "m").read_bytes() == (tmp_path / "again").read_bytes()


def test_nothing_is_taken_that_is_worse_than_the_start(
    base: Path, experts: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blending, "_LEARNING_RATE", 1000.0)
    blend = learn_blend(base, open_checkpoint(base), [deltas(file, base) for file in experts], PROMPTS)
    assert isinstance(blend, Blend)
    assert blend.kl == blend.kl_at_start
    assert {value for row in blend.weights for value in row.values()} == {blending.START}


def test_what_atlas_cannot_do_is_said(base: Path, experts: list[Path], tmp_path: Path) -> None:
    weights, manifest = open_checkpoint(base), manifest_of(base, None)
    pairs = [(file, 1.0) for file in experts]
    with pytest.raises(InvalidRequestError, match="learns the weights"):
        merge_experts([pairs[0], (experts[1], 0.5)], manifest, tmp_path / "m", SETTINGS, weights=weights)
    with pytest.raises(InvalidRequestError, match="checkpoint"):
        merge_experts(pairs, manifest, tmp_path / "m", SETTINGS)
    with pytest.raises(InvalidRequestError, match="shots"):
        merge_experts(pairs, manifest, tmp_path / "m", replace(SETTINGS, shots=0), weights=weights)
    compress(base, experts[0].parent / "tuned-1", tmp_path / "mute", codec="raw")
    with pytest.raises(InvalidRequestError, match="mute holds no exemplars"):
        merge_experts([pairs[0], (tmp_path / "mute", 1.0)], manifest, tmp_path / "m", SETTINGS, weights=weights)


def test_a_base_that_cannot_run_is_named(base: Path, experts: list[Path], tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes())
    pair = [(path, 1.0) for path in experts]
    with pytest.raises(CheckpointError, match=r"(?s)the base cannot be loaded .* the other methods do without"):
        merge_experts(pair, manifest_of(base, None), tmp_path / "m", SETTINGS, weights=open_checkpoint(tmp_path))
