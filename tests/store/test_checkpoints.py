"""Checkpoint folders: reading, fingerprints, task vectors."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import store.fingerprint
from store.checkpoint import open_checkpoint
from store.errors import CheckpointError
from store.fingerprint import manifest_of
from store.task_vector import task_vector


def tensors(seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "model.embed_tokens.weight": (11, 6),
        "model.layers.0.mlp.weight": (6, 6),
        "model.layers.0.conv.weight": (2, 3, 2, 2),
        "model.norm.weight": (6,),
        "model.scale": (),
        "model.empty": (0, 6),
    }
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def save(folder: Path, values: dict[str, torch.Tensor], *, shards: int = 1, **config: object) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    names = sorted(values)
    if shards == 1:
        save_file(values, folder / "model.safetensors")
        return folder
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard:05}.safetensors"
        save_file({name: values[name] for name in names[shard::shards]}, folder / file)
        weight_map |= dict.fromkeys(names[shard::shards], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_the_fingerprint_is_the_documented_digest(tmp_path: Path) -> None:
    values = tensors()
    digest = hashlib.sha256(b"switchyard base v1\n")
    for name in sorted(values):
        digest.update(name.encode() + b"\0" + ",".join(map(str, values[name].shape)).encode() + b"\0")
        digest.update(values[name].view(torch.int16).numpy().tobytes() if values[name].numel() else b"")
    manifest = manifest_of(save(tmp_path / "m", values), None)
    assert manifest.fingerprint == digest.hexdigest()
    assert manifest.tensors == {name: tuple(value.shape) for name, value in values.items()}


def test_the_fingerprint_does_not_depend_on_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store.fingerprint, "_CHUNK", 5)
    values = tensors()
    wide = {name: value.float() for name, value in values.items()}
    embedding = {"lm_head.weight": values["model.embed_tokens.weight"].clone()}
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3), "position_ids": torch.arange(4)}
    manifests = [
        manifest_of(folder, None)
        for folder in (
            save(tmp_path / "bf16", values),
            save(tmp_path / "fp32", wide),
            save(tmp_path / "fp64", {name: value.double() for name, value in values.items()}),
            save(tmp_path / "shards", values, shards=3),
            save(tmp_path / "tied", values | embedding, tie_word_embeddings=True),
            save(tmp_path / "tied by default", values | embedding),
            save(tmp_path / "nested", values | embedding, text_config={"tie_word_embeddings": True}),
            save(tmp_path / "buffers", values | old),
        )
    ]
    assert all(manifest == manifests[0] for manifest in manifests)


def test_the_fingerprint_sees_every_change(tmp_path: Path) -> None:
    values = tensors()
    nudged = {name: value.clone() for name, value in values.items()}
    nudged["model.norm.weight"][3] *= 1.01
    renamed = {name.replace("norm", "normal"): value for name, value in values.items()}
    reshaped = values | {"model.layers.0.mlp.weight": values["model.layers.0.mlp.weight"].view(4, 9)}
    head = values | {"lm_head.weight": values["model.embed_tokens.weight"].clone()}
    variants = [values, nudged, renamed, reshaped]
    digests = {manifest_of(save(tmp_path / str(row), value), None).fingerprint for row, value in enumerate(variants)}
    digests.add(manifest_of(save(tmp_path / "untied", head, tie_word_embeddings=False), None).fingerprint)
    assert len(digests) == 5


def test_the_cache_is_used_and_noticed_stale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, cache = save(tmp_path / "m", tensors()), tmp_path / "cache" / "deep"
    first = manifest_of(folder, cache)
    (cached,) = cache.iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(store.fingerprint, "fingerprint_of", None)
        assert manifest_of(folder, cache) == first
    cached.write_text('{"fingerprint": "nonsense"}')
    assert manifest_of(folder, cache) == first
    save_file(tensors(seed=1), folder / "model.safetensors")
    assert manifest_of(folder, cache).fingerprint != first.fingerprint


def test_an_unwritable_cache_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    manifest_of(save(tmp_path / "m", tensors()), tmp_path / "file")


def test_folders_without_safetensors(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a folder"):
        open_checkpoint(tmp_path / "none")
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        open_checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(CheckpointError, match=r"never read here.*save_pretrained"):
        open_checkpoint(tmp_path)


def test_one_file_of_any_name_will_do_but_not_two(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "weights.safetensors")
    assert len(open_checkpoint(tmp_path).tensors) == 6
    save_file(tensors(), tmp_path / "more.safetensors")
    with pytest.raises(CheckpointError, match="2 safetensors files"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": {"a": 3}}', '{"weight_map": {"a": "../x"}}', "{}"])
def test_a_broken_index(tmp_path: Path, content: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match="index"):
        open_checkpoint(tmp_path)


def test_damaged_and_quantised_files_are_named(tmp_path: Path) -> None:
    folder = save(tmp_path / "m", tensors())
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: .*cut short"):
        open_checkpoint(folder)
    with pytest.raises(CheckpointError, match="quantised"):
        open_checkpoint(save(tmp_path / "q", {"w": torch.zeros(4, dtype=torch.int8)}))


def test_a_head_that_contradicts_its_configuration(tmp_path: Path) -> None:
    values = tensors() | {"lm_head.weight": torch.zeros(11, 6)}
    with pytest.raises(CheckpointError, match="tie_word_embeddings"):
        open_checkpoint(save(tmp_path / "m", values, tie_word_embeddings=True))


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tuned_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_task_vectors_of_any_rank_and_dtype(tmp_path: Path, base_dtype: torch.dtype, tuned_dtype: torch.dtype) -> None:
    base, tuned = tensors(0, base_dtype), tensors(1, tuned_dtype)
    deltas = dict(task_vector(save(tmp_path / "base", base), save(tmp_path / "tuned", tuned, shards=2)))
    assert list(deltas) == sorted(base)
    for name, delta in deltas.items():
        assert delta.dtype == torch.float32
        torch.testing.assert_close(delta, tuned[name].float() - base[name].float(), rtol=0, atol=0)


def test_tied_weights_count_once(tmp_path: Path) -> None:
    base, tuned = tensors(0), tensors(1)
    tuned["lm_head.weight"] = tuned["model.embed_tokens.weight"].clone()
    pair = save(tmp_path / "base", base), save(tmp_path / "tuned", tuned, tie_word_embeddings=True)
    assert dict(task_vector(*pair)).keys() == base.keys()


def test_folders_that_do_not_match(tmp_path: Path) -> None:
    values = tensors()
    base = save(tmp_path / "base", values)

    def difference(name: str, changed: dict[str, torch.Tensor]) -> str:
        with pytest.raises(CheckpointError) as caught:
            next(task_vector(base, save(tmp_path / name, changed)))
        return caught.value.message

    resized = difference("resized", values | {"model.embed_tokens.weight": torch.zeros(13, 6)})
    assert "resized the vocabulary" in resized
    assert "13 rows" in resized
    assert "11" in resized
    assert "[3, 3]" in difference("shape", values | {"model.layers.0.mlp.weight": torch.zeros(3, 3)})
    assert "adds a.lora, b.lora" in difference("extra", values | {"a.lora": torch.ones(1), "b.lora": torch.ones(1)})
    missing = difference("missing", {"model.scale": values["model.scale"]})
    assert "lacks model.embed_tokens.weight" in missing


def test_values_are_read_only_and_mapped(tmp_path: Path) -> None:
    tensor = open_checkpoint(save(tmp_path / "m", tensors())).tensors["model.norm.weight"]
    values = tensor.read()
    assert isinstance(values, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        values[0] = 0
