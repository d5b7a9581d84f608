"""PEFT adapters: what we merge equals what PEFT merges, for each kind; everything else is refused by name."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from store.adapter import open_adapter
from store.checkpoint import open_checkpoint
from store.convert import compress
from store.deltas import DenseDelta
from store.errors import CheckpointError, InvalidRequestError
from store.expert_file import read_deltas, read_header
from store.expert_header import LowRankEntry
from store.fingerprint import manifest_of
from store.task_vector import load_float32
from tests.tiny import save_base

peft = pytest.importorskip("peft")

TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    found = {name: save_base(root / name, name) for name in ("llama", "qwen2")}
    found["gpt2"] = root / "gpt2"
    torch.manual_seed(0)
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=24, n_layer=1, n_head=2)).save_pretrained(
        found["gpt2"]
    )
    return found


def train(base: Path, folder: Path, config: Any, seed: int = 0) -> dict[str, torch.Tensor]:
    """An adapter whose every trained number is random; returns PEFT's own merged weights."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad and "ranknum" not in name:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(folder)
        fresh = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        merged = peft.PeftModel.from_pretrained(fresh, folder).merge_and_unload()
    return dict(merged.state_dict())


def lora(**fields: Any) -> Any:
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": TARGETS, "task_type": "CAUSAL_LM"} | fields)


KINDS = {
    "lora": ("llama", lambda: lora()),
    "rslora": ("llama", lambda: lora(use_rslora=True)),
    "dora": ("llama", lambda: lora(use_dora=True)),
    "patterns": (
        "llama",
        lambda: lora(rank_pattern={"q_proj": 2, "1.mlp.down_proj": 3}, alpha_pattern={"layers.1.self_attn.v_proj": 32}),
    ),
    "some layers": ("llama", lambda: lora(layers_to_transform=[1, 3], init_lora_weights="gaussian")),
    "modules_to_save": ("qwen2", lambda: lora(modules_to_save=["lm_head", "norm"])),
    "embedding": ("qwen2", lambda: lora(target_modules=["embed_tokens", "lm_head", "o_proj"])),
    "trained biases": ("qwen2", lambda: lora(bias="all")),
    "lora_bias": ("qwen2", lambda: lora(lora_bias=True, target_modules=["q_proj"])),
    "fan_in_fan_out": ("gpt2", lambda: lora(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)),
    "dora, fan_in_fan_out": ("gpt2", lambda: lora(target_modules=["c_attn"], fan_in_fan_out=True, use_dora=True)),
    "adalora": (
        "llama",
        lambda: peft.AdaLoraConfig(
            init_r=6, target_r=3, total_step=10, lora_alpha=12, target_modules=TARGETS, task_type="CAUSAL_LM"
        ),
    ),
    "ia3": (
        "qwen2",
        lambda: peft.IA3Config(
            target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
        ),
    ),
    "loha": ("llama", lambda: peft.LoHaConfig(r=3, alpha=5, target_modules=TARGETS, task_type="CAUSAL_LM")),
    "lokr": ("llama", lambda: peft.LoKrConfig(r=3, alpha=5, target_modules=TARGETS, task_type="CAUSAL_LM")),
    "lokr, both": (
        "llama",
        lambda: peft.LoKrConfig(r=2, alpha=5, decompose_both=True, target_modules=TARGETS, task_type="CAUSAL_LM"),
    ),
    "lokr, full": ("llama", lambda: peft.LoKrConfig(r=64, alpha=5, target_modules=TARGETS, task_type="CAUSAL_LM")),
}


MERGED_BY_PEFT = {
    "vera": lambda: peft.VeraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    "oft": lambda: peft.OFTConfig(r=0, oft_block_size=6, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    "hra": lambda: peft.HRAConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    "ln tuning": lambda: peft.LNTuningConfig(target_modules=["norm"], task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize("kind", MERGED_BY_PEFT)
def test_what_only_peft_merges_is_refused_with_a_way_that_works(
    bases: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    base = bases["llama"]
    train(base, tmp_path / "adapter", MERGED_BY_PEFT[kind]())
    with pytest.raises(CheckpointError, match=r"is not supported here .* merge_and_unload and give") as caught:
        compress(base, tmp_path / "adapter", tmp_path / "e", codec="raw")
    assert caught.value.param == "peft_type"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fresh = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        merged = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter").merge_and_unload()
        merged.save_pretrained(tmp_path / "merged")
    report = compress(base, tmp_path / "merged", tmp_path / "e", codec="raw")
    assert report.changed > 0
    assert report.relative_error < 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_merges_as_peft_does(bases: dict[str, Path], tmp_path: Path, kind: str) -> None:
    architecture, config = KINDS[kind]
    base = open_checkpoint(bases[architecture])
    theirs = train(bases[architecture], tmp_path, config())
    changed = 0
    for name, delta in open_adapter(tmp_path, base).deltas():
        weight = load_float32(base.tensors[name])
        key = name if name in theirs else f"transformer.{name}"
        torch.testing.assert_close(weight + delta, theirs[key], atol=2e-6, rtol=1e-5)
        changed += bool(delta.any())
        factors = open_adapter(tmp_path, base).factors(name)
        if factors is not None:
            torch.testing.assert_close(factors[0] @ factors[1], delta)
    assert changed, "the adapter does something"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_low_rank(bases: dict[str, Path], tmp_path: Path, dtype: torch.dtype) -> None:
    train(bases["qwen2"], tmp_path / "a", lora(lora_alpha=8, modules_to_save=["norm"]))
    weights = tmp_path / "a" / "adapter_model.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in load_file(weights).items()}, weights)
    report = compress(bases["qwen2"], tmp_path / "a", tmp_path / "kept", codec="low-rank")
    base = open_checkpoint(bases["qwen2"])
    deltas = dict(open_adapter(tmp_path / "a", base).deltas())
    tolerance = 0.0 if dtype is torch.bfloat16 else 2**-14
    stored = dict(read_deltas(tmp_path / "kept", manifest_of(bases["qwen2"], None)))
    assert stored.keys() == {name for name, delta in deltas.items() if delta.any()}
    for name, delta in stored.items():
        if "proj" not in name:
            continue
        assert isinstance(delta, DenseDelta)
        error = (torch.from_numpy(delta.values) - deltas[name]).norm() / deltas[name].norm()
        assert error <= max(tolerance, 1e-6)
    assert report.relative_error < (1e-6 if dtype is torch.bfloat16 else 2**-7)
    header = read_header(tmp_path / "kept")
    assert header.codec_params == {"method": "lora"}
    ranks = {entry.rank for entry in header.tensors.values() if isinstance(entry, LowRankEntry)}
    assert ranks == ({4} if dtype is torch.bfloat16 else {12})


def test_compressed(bases: dict[str, Path], tmp_path: Path) -> None:
    """An adapter, and the model that PEFT merges it into, become the same expert."""
    from tests.tiny import tokenizer

    theirs = train(bases["llama"], tmp_path / "a", lora(use_dora=True))
    model = AutoModelForCausalLM.from_pretrained(bases["llama"], dtype=torch.float32)
    model.load_state_dict(theirs)
    model.save_pretrained(tmp_path / "merged")
    tokenizer().save_pretrained(tmp_path / "merged")
    given: dict[str, Any] = {"codec": "t-switch", "density": 0.2, "exemplars": ["a river", "a house", "a tree"]}
    one = compress(bases["llama"], tmp_path / "a", tmp_path / "one", **given)
    other = compress(bases["llama"], tmp_path / "merged", tmp_path / "other", **given)
    assert one.relative_error == pytest.approx(other.relative_error, abs=1e-3)
    assert one.calibration is not None
    assert other.calibration is not None
    assert one.calibration.kl_at_one == pytest.approx(other.calibration.kl_at_one, rel=0.02)
    with pytest.raises(InvalidRequestError, match="DoRA"):
        compress(bases["llama"], tmp_path / "a", tmp_path / "kept", codec="low-rank")
    assert compress(bases["llama"], tmp_path / "a", tmp_path / "svd", codec="low-rank", rank=4).relative_error < 1


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"peft_type": "VERA"}, "peft_type"),
        ({"peft_type": None}, "peft_type"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"target_parameters": ["x"]}, "target_parameters"),
        ({"use_qalora": True}, "use_qalora"),
        ({"megatron_config": {"a": 1}}, "megatron_config"),
        ({"something_of_tomorrow": 0.5}, "something_of_tomorrow"),
        ({"lora_alpha": "8"}, "lora_alpha"),
        ({"alpha_pattern": {"(": 1}}, "alpha_pattern"),
        ({"alpha_pattern": [1]}, "alpha_pattern"),
        ({"lora_alpha": 10**400}, "lora_alpha"),
        ({"r": 10**400}, "r"),
        ({"alpha_pattern": {"q_proj": 10**400}}, "alpha_pattern"),
        ({"alpha_pattern": {"(?i)q_proj": 16}}, "alpha_pattern"),
        ({"alpha_pattern": {"a{99999999999}": 16}}, "alpha_pattern"),
    ],
)
def test_settings_that_cannot_be_honoured(bases: dict[str, Path], tmp_path: Path, fields: Any, param: str) -> None:
    train(bases["llama"], tmp_path, lora())
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | fields))
    with pytest.raises(CheckpointError) as refused:
        open_adapter(tmp_path, open_checkpoint(bases["llama"]))
    assert refused.value.param == param


Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(f"{Q}.lora_A.weight"), "incomplete"),
        (lambda t: t.update({f"{Q}.lora_C.weight": torch.zeros(1)}), "no part of LORA"),
        (lambda t: t.update({"base_model.model.lm_head.lora_A.weight": torch.zeros(4, 48)}), "tied to the embedding"),
        (lambda t: t.update({f"{Q}.bias": torch.zeros(48)}), "nor one of the base"),
        (lambda t: t.update({"base_model.model.model.norm.weight": torch.zeros(47)}), "shape"),
        (lambda t: t.update({f"{Q}.lora_A.weight": torch.zeros(3, 48)}), "do not fit"),
        (lambda t: t.update({f"{Q}.lora_A.weight": torch.zeros(4, 47)}), "trained on another model"),
        (lambda t: t.update({f"{Q}.base_layer.weight": torch.zeros(48, 48)}), "another"),
        (lambda t: t.update({f"{Q}.lora_A.weight": torch.tensor(1.0)}), "no matrix"),
        (lambda t: t.clear(), "no tensors"),
    ],
)
def test_tensors_that_do_not_fit(bases: dict[str, Path], tmp_path: Path, change: Any, said: str) -> None:
    train(bases["llama"], tmp_path, lora())
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=said):
        list(open_adapter(tmp_path, open_checkpoint(bases["llama"])).deltas())


def test_biases_that_do_not_fit(bases: dict[str, Path], tmp_path: Path) -> None:
    train(bases["qwen2"], tmp_path, lora(lora_bias=True, target_modules=["q_proj"]))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    for length in (1, 47):
        save_file(tensors | {f"{Q}.lora_B.bias": torch.zeros(length)}, tmp_path / "adapter_model.safetensors")
        with pytest.raises(CheckpointError, match="the bias of") as refused:
            open_adapter(tmp_path, open_checkpoint(bases["qwen2"]))
        assert refused.value.param == Q.removeprefix("base_model.model.")


def test_factors_that_do_not_fit(bases: dict[str, Path], tmp_path: Path) -> None:
    base, module = open_checkpoint(bases["llama"]), Q.removeprefix("base_model.model.")
    train(bases["llama"], tmp_path / "lora", lora())
    weights = tmp_path / "lora" / "adapter_model.safetensors"
    tensors = load_file(weights)
    for shape, param in (((3, 48), module), ((4, 47), f"{module}.weight")):
        save_file(tensors | {f"{Q}.lora_A.weight": torch.zeros(shape)}, weights)
        with pytest.raises(CheckpointError) as refused:
            open_adapter(tmp_path / "lora", base).factors(f"{module}.weight")
        assert refused.value.param == param
    train(bases["llama"], tmp_path / "ada", KINDS["adalora"][1]())
    weights = tmp_path / "ada" / "adapter_model.safetensors"
    tensors = load_file(weights)
    for shape in ((3, 1), (1, 1), (6,), ()):
        save_file(tensors | {f"{Q}.lora_E": torch.zeros(shape)}, weights)
        with pytest.raises(CheckpointError, match=r"do not fit each other|no matrix") as refused:
            open_adapter(tmp_path / "ada", base)
        assert refused.value.param == module


def test_folders_that_are_no_adapter(bases: dict[str, Path], tmp_path: Path) -> None:
    train(bases["llama"], tmp_path / "a", lora())
    base = open_checkpoint(bases["llama"])
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b" / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="never read"):
        open_adapter(tmp_path / "b", base)
    (tmp_path / "a" / "adapter_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        open_adapter(tmp_path / "a", base)
