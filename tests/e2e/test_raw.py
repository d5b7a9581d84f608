"""Raw fine-tunes pushed from the command line to a whole server: what it makes of them answers as they do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.e2e.conftest import Start, switchyard
from tests.tiny import save_base

PROMPT = "the river 77 is long"
MODULE = "model.layers.{}.self_attn.q_proj"


def save_adapter(folder: Path) -> dict[str, torch.Tensor]:
    """A LoRA by hand, in the form that PEFT saves; returns what it adds to the weights."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(5)
    tensors, added = {}, {}
    for layer in range(4):
        left, right = (torch.randn(shape, generator=generator).bfloat16() for shape in ((48, 4), (4, 48)))
        module = MODULE.format(layer)
        tensors[f"base_model.model.{module}.lora_A.weight"] = right.contiguous()
        tensors[f"base_model.model.{module}.lora_B.weight"] = left.contiguous()
        added[f"{module}.weight"] = 0.25 * (left.float() @ right.float())
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 1, "target_modules": ["q_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return added


def greedy(base: Path, added: dict[str, torch.Tensor]) -> str:
    """transformers' own answer on the base with something added."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        for name, delta in added.items():
            model.get_parameter(name).add_(delta)
    tokenizer = AutoTokenizer.from_pretrained(base)
    ids = tokenizer(PROMPT, add_special_tokens=False, return_tensors="pt").input_ids
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    answer: str = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    return answer


@pytest.mark.slow
def test_an_adapter_is_pushed_and_answers_as_it_would_merged(tmp_path: Path, start: Start) -> None:
    base = save_base(tmp_path / "base")
    added = save_adapter(tmp_path / "adapter")
    server = start(
        "--base", base, "--base-name", "tiny", "--data-dir", tmp_path / "data", "--cache-dir", tmp_path / "cache",
        "--feature-layer", "2", "--kv-bytes", "8MiB",
    )  # fmt: skip
    at = {"SWITCHYARD_SERVER": server.url}
    pushed = switchyard("push", tmp_path / "adapter", "--name", "adapted", "--codec", "low-rank", **at)
    assert pushed.returncode == 0, pushed.stdout + pushed.stderr
    assert "adapted is live" in pushed.stdout
    ask = {"model": "adapted", "prompt": PROMPT, "temperature": 0, "max_tokens": 12}
    expected = greedy(base, added)
    assert expected != greedy(base, {})
    assert server.client().completions.create(**ask).choices[0].text == expected
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"peft_type": "VERA"}')
    refused = switchyard("push", tmp_path / "adapter", **at)
    assert refused.returncode == 1
    assert "VERA is not supported here" in refused.stderr
    (tmp_path / "empty").mkdir()
    assert "no safetensors" in switchyard("push", tmp_path / "empty", **at).stderr
    assert server.stop() == 0
