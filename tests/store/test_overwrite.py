"""Overwrite: a fine-tune comes back bit by bit, or is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from store.apply import apply_expert
from store.checkpoint import CheckpointTensor, open_checkpoint
from store.codecs.overwrite import overwrite, steps_between
from store.convert import compress
from store.errors import CheckpointError, ExpertFileError, InvalidRequestError, WrongBaseError
from store.expert_file import read_deltas, validate
from store.fingerprint import manifest_of
from store.merge_methods import MergeSettings, Method
from store.merging import merge_experts
from store.overwriting import as_float_delta, new_patterns
from store.patterns import Half
from store.probe import probe

TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(BITS[tensor.dtype])


def checkpoint(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(parents=True)
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"tie_word_embeddings": False}))
    return folder


def finite_halves(seed: int, numel: int, half: str) -> torch.Tensor:
    """Random bit patterns of every kind but NaN and infinity: zeros of both signs, subnormals, the largest."""
    patterns = np.random.default_rng(seed).integers(0, 1 << 16, numel).astype(np.uint16)
    exponent = 0x7F80 if half == "BF16" else 0x7C00
    patterns[(patterns & exponent) == exponent] ^= 0x4000
    return torch.from_numpy(patterns.view(np.int16)).view(TORCH[half])


def stored(folder: Path, tensor: torch.Tensor) -> CheckpointTensor:
    return open_checkpoint(checkpoint(folder, {"w": tensor})).tensors["w"]


@given(
    shape=st.lists(st.integers(1, 37), min_size=1, max_size=3),
    half=st.sampled_from(["BF16", "F16"]),
    base_wide=st.booleans(),
    tuned_wide=st.booleans(),
    density=st.sampled_from([0.0, 0.01, 0.2, 0.7, 1.0]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_every_bit_comes_back(
    tmp_path_factory: pytest.TempPathFactory,
    shape: list[int],
    half: str,
    base_wide: bool,
    tuned_wide: bool,
    density: float,
    seed: int,
) -> None:
    """Odd sizes, all changed, none changed, zeros of both signs; either checkpoint may be kept in 32 bits."""
    folder = tmp_path_factory.mktemp("pair")
    numel = int(np.prod(shape))
    old, new = finite_halves(seed, numel, half), finite_halves(seed + 1, numel, half)
    moved = torch.from_numpy(np.random.default_rng(seed + 2).random(numel) < density)
    new = torch.where(moved, bits(new), bits(old)).view(TORCH[half]).view(shape)
    old = old.view(shape)
    base = stored(folder / "base", old.float() if base_wide else old)
    packed = overwrite("w", base, stored(folder / "tuned", new.float() if tuned_wide else new))
    changed = torch.nonzero(bits(new).view(-1) != bits(old).view(-1)).view(-1)
    if packed is None:
        assert not len(changed)
        return
    delta = packed.decode("w")
    assert delta.indices.tolist() == changed.tolist()
    # Small patterns fit both types, where the values are wide: which one is free, the values are not.
    values = torch.from_numpy(new_patterns(delta, base, "w").view(np.int16)).view(TORCH[packed.half])
    assert torch.equal(bits(values.float()), bits(new.view(-1)[changed].float()))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_broken_fine_tunes_are_refused(tmp_path: Path, bad: float, dtype: torch.dtype) -> None:
    old = torch.ones(3, 5, dtype=dtype)
    new = old.clone()
    new[1, 2] = bad
    with pytest.raises(CheckpointError, match="tensor w of the fine-tune holds NaN or infinite") as caught:
        overwrite("w", stored(tmp_path / "base", old), stored(tmp_path / "tuned", new))
    assert caught.value.param == "w"


@pytest.mark.parametrize("broken", ["base", "tuned"])
def test_weights_of_more_than_16_bits_are_refused(tmp_path: Path, broken: str) -> None:
    pair = {"base": torch.ones(4, 4), "tuned": torch.ones(4, 4)}
    pair[broken][0, 0] = 0.1
    with pytest.raises(CheckpointError, match="save both in the same 16-bit type"):
        steps_between("w", stored(tmp_path / "base", pair["base"]), stored(tmp_path / "tuned", pair["tuned"]))


@pytest.fixture(scope="module", params=["BF16", "F16", "F32"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base of that type, and a fine-tune as a reinforcement learning run leaves it: few weights, one step away."""
    folder = tmp_path_factory.mktemp(request.param)
    dtype = TORCH[request.param]
    generator = torch.Generator().manual_seed(0)
    old = {
        "embed_tokens.weight": torch.randn(96, 64, generator=generator),
        "layers.0.weight": torch.randn(64, 64, generator=generator),
        "layers.1.weight": torch.randn(64, 33, generator=generator),
        "norm.weight": torch.ones(64),
    }
    half = torch.bfloat16 if dtype is torch.float32 else dtype
    old = {name: tensor.to(half) for name, tensor in old.items()}
    new = {}
    for name, tensor in old.items():
        step = (torch.rand(tensor.shape, generator=generator) < 0.1).to(torch.int16)
        new[name] = (bits(tensor) + step).view(half) if name != "layers.1.weight" else tensor.clone()
    new["norm.weight"][3] = -0.0
    base = checkpoint(folder / "base", {name: tensor.to(dtype) for name, tensor in old.items()})
    return base, checkpoint(folder / "tuned", {name: tensor.to(dtype) for name, tensor in new.items()})


def same_bits(merged: dict[str, torch.Tensor], tuned: Path) -> bool:
    wanted = load_file(tuned / "model.safetensors")
    return merged.keys() == wanted.keys() and all(torch.equal(bits(merged[n]), bits(wanted[n])) for n in wanted)


def half_of(folder: Path) -> str:
    """What the numbers of a checkpoint are, whatever they are stored in."""
    values = load_file(folder / "model.safetensors").values()
    return "BF16" if all(torch.equal(value.bfloat16().to(value.dtype), value) for value in values) else "F16"


def test_end_to_end(run: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = run
    out = tmp_path / "expert"
    report = compress(base, tuned, out, codec="overwrite", name="rl")
    header = validate(out, manifest_of(base, None))
    assert header.is_exact
    assert header.half == half_of(tuned)
    assert header.required_features[0] == "overwrite"
    assert header.codec_params == {"fine_tune": manifest_of(tuned, None).fingerprint}
    assert same_bits(apply_expert(out, base, tmp_path / "merged"), tuned)
    assert (tmp_path / "merged" / "model.safetensors").read_bytes() == (tuned / "model.safetensors").read_bytes()
    assert not same_bits(apply_expert(out, base, weight=0.5), tuned)
    assert report.relative_error == 0.0
    rows = {row.kind: row for row in report.rows}
    assert rows["overwrite"].nonzeros == round(report.changed * sum(row.parameters for row in report.rows))
    compress(base, tuned, tmp_path / "again", codec="overwrite", name="rl")
    assert (tmp_path / "again").read_bytes() == out.read_bytes()


def test_the_probe_tells_what_overwriting_would_take(run: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = run
    report = compress(base, tuned, tmp_path / "lossy", density=0.05)
    exact = compress(base, tuned, tmp_path / "exact", codec="overwrite")
    found = report.probe
    assert found is not None
    assert found == exact.probe
    assert found.is_worth_it
    assert 0.05 < found.changed < 0.1
    data = sum(row.bytes for row in exact.rows)
    assert found.bytes == pytest.approx(data, rel=0.15)  # small tensors: streams are rounded up to bytes


def test_the_probe_knows_when_it_is_not_worth_it(tmp_path: Path) -> None:
    old = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    pair = {"base": old.bfloat16(), "tuned": (old * 1.1).bfloat16(), "wide": old * 1.1}
    folders = {name: open_checkpoint(checkpoint(tmp_path / name, {"w": tensor})) for name, tensor in pair.items()}
    found = probe(folders["base"], folders["tuned"])
    assert found is not None
    assert found.changed > 0.9
    assert not found.is_worth_it
    assert probe(folders["base"], folders["wide"]) is None


def test_a_merge_takes_its_float_delta(run: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = run
    manifest, weights = manifest_of(base, None), open_checkpoint(base)
    compress(base, tuned, tmp_path / "exact", codec="overwrite")
    compress(base, tuned, tmp_path / "raw", codec="raw")
    taken = dict(read_deltas(tmp_path / "exact", manifest))
    for name, delta in read_deltas(tmp_path / "raw", manifest):
        change = as_float_delta(taken[name], weights, name)
        assert np.allclose(change, as_float_delta(delta, None, name), rtol=2**-7)
    settings = MergeSettings(Method.TASK_ARITHMETIC, strength=0.5)
    pair = [(tmp_path / "exact", 1.0), (tmp_path / "raw", 1.0)]
    merge_experts(pair, manifest, tmp_path / "merged", settings, weights=weights)
    with pytest.raises(CheckpointError, match="give the base's checkpoint too"):
        merge_experts(pair, manifest, tmp_path / "merged", settings)


def test_another_base_s_bits_are_noticed(tmp_path: Path) -> None:
    """A float16 base and its rounded copy have one fingerprint; what is overwritten still has to come out right."""
    old = torch.randn(32, 32, generator=torch.Generator().manual_seed(0)).half()
    new = (bits(old) + 1).view(torch.float16)
    base, tuned = checkpoint(tmp_path / "base", {"w": old}), checkpoint(tmp_path / "tuned", {"w": new})
    copy = checkpoint(tmp_path / "copy", {"w": old.bfloat16()})
    compress(base, tuned, tmp_path / "expert", codec="overwrite")
    assert manifest_of(base, None) == manifest_of(copy, None)
    with pytest.raises(ExpertFileError, match="rounded copy") as caught:
        apply_expert(tmp_path / "expert", copy)
    assert caught.value.param == "w"
    fine = checkpoint(tmp_path / "fine", {"w": old.bfloat16().float() + 1e-9})
    rounded = checkpoint(tmp_path / "rounded", {"w": (bits(old.bfloat16()) + 1).view(torch.bfloat16)})
    compress(copy, rounded, tmp_path / "from-copy", codec="overwrite")
    assert manifest_of(fine, None) == manifest_of(copy, None)
    with pytest.raises(ExpertFileError, match="serve the base in BF16"):
        apply_expert(tmp_path / "from-copy", fine)
    other = checkpoint(tmp_path / "other", {"w": old.float() * 2})
    with pytest.raises(WrongBaseError):
        apply_expert(tmp_path / "expert", other)


def test_steps_that_lead_to_infinity_are_refused(tmp_path: Path) -> None:
    """A hostile file whose digest is right for what it says."""
    import dataclasses
    import hashlib

    old = torch.ones(4, 4, dtype=torch.bfloat16)
    new = old.clone()
    new[0, 0] = 2.0
    base = stored(tmp_path / "base", old)
    packed = overwrite("w", base, stored(tmp_path / "tuned", new))
    assert packed is not None
    delta = packed.decode("w")
    infinity = np.array([0x7F80], dtype="<u2")
    steps = (infinity.astype(np.uint16) - np.uint16(0x3F80)).view(np.int16)
    hostile = dataclasses.replace(delta, steps=steps, sha256=hashlib.sha256(infinity.tobytes()).hexdigest())
    with pytest.raises(ExpertFileError, match="NaN or infinite"):
        new_patterns(hostile, base, "w")
    assert delta.half is Half.BF16


@pytest.mark.parametrize(
    ("options", "param"),
    [({"tensor_density": {"*norm*": 0.0}}, "tensor_density"), ({"bits_per_param": 0.1}, "bits_per_param")],
)
def test_options_that_would_lose_something(
    run: tuple[Path, Path], tmp_path: Path, options: dict[str, Any], param: str
) -> None:
    base, tuned = run
    with pytest.raises(InvalidRequestError) as caught:
        compress(base, tuned, tmp_path / "e", codec="overwrite", **options)
    assert caught.value.param == param
