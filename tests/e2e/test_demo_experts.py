"""The shipped experts on the real base: what the server says is what transformers says of the offline-merged model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.base import packaged_gguf
from server.engine.base_source import resolve_base
from store.apply import apply_expert
from store.expert_file import read_header
from tests.e2e.conftest import ROOT, ServerProcess, start_server

EXPERTS = sorted((ROOT / "examples" / "experts").glob("*.safetensors"))
MAX_TOKENS = 24
TIE = 1e-3
"""Where the reference's two best logits lie this close, float32 rounding may decide between them."""


@pytest.fixture(scope="module")
def base() -> Path:
    return resolve_base(str(packaged_gguf()), ROOT / ".cache")


@pytest.fixture(scope="module")
def server(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    data = tmp_path_factory.mktemp("data")
    server = start_server(
        "--base", base, "--base-name", "smollm2-135m-instruct", "--experts", ROOT / "examples" / "experts",
        "--data-dir", data, "--cache-dir", ROOT / ".cache",
    )  # fmt: skip
    yield server
    assert server.stop() == 0


@pytest.fixture(scope="module")
def reference(base: Path) -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), AutoTokenizer.from_pretrained(base)


def test_at_least_four_experts_are_shipped_and_none_is_large() -> None:
    assert len(EXPERTS) >= 4
    for file in EXPERTS:
        assert file.stat().st_size <= 8_000_000
        assert len(read_header(file).exemplars) >= 20


def chat_ids(tokenizer: Any, prompt: str) -> torch.Tensor:
    messages = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids: torch.Tensor = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    return ids


@torch.inference_mode()
def first_tie(model: Any, ids: torch.Tensor, prompt_length: int) -> int:
    """How many answer tokens come before the first one whose choice is a tie."""
    top = model(ids).logits[0, prompt_length - 1 : -1].float().topk(2).values
    ties = (top[:, 0] - top[:, 1] < TIE).nonzero()
    return int(ties[0]) if len(ties) else len(top)


@pytest.mark.parametrize("file", EXPERTS, ids=lambda file: file.stem)
def test_greedy_answers_equal_the_offline_merged_model(
    server: ServerProcess, base: Path, reference: tuple[Any, Any], file: Path
) -> None:
    model, tokenizer = reference
    model.load_state_dict(apply_expert(file, base, cache_dir=ROOT / ".cache"), strict=False)
    model.tie_weights()
    header = read_header(file)
    for prompt in (header.exemplars[1], header.exemplars[-1], "What is the tallest mountain in Africa?"):
        body = {"model": header.name, "messages": [{"role": "user", "content": prompt}], "temperature": 0}
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=body | {"max_tokens": MAX_TOKENS}, timeout=120)
        said = answer.json()["choices"][0]["message"]["content"]
        ids = chat_ids(tokenizer, prompt)
        output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=MAX_TOKENS, do_sample=False)
        expected = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
        if said != expected:
            certain = first_tie(model, output, ids.shape[1])
            assert certain < MAX_TOKENS, f"{said!r} is not {expected!r}"
            sure = tokenizer.decode(output[0, ids.shape[1] : ids.shape[1] + certain], skip_special_tokens=True)
            assert said.startswith(sure)


def test_every_expert_is_routed_to_by_its_own_kind_of_prompt(server: ServerProcess) -> None:
    for file in EXPERTS:
        header = read_header(file)
        decision = httpx.post(f"{server.url}/v1/route", json={"prompt": header.exemplars[0]}, timeout=60).json()
        assert [part["id"] for part in decision["mix"]] == [header.name], json.dumps(decision)[:500]


def test_a_question_of_another_kind_goes_to_the_base(server: ServerProcess) -> None:
    prompt = {"prompt": "What is the tallest mountain in Africa?"}
    decision = httpx.post(f"{server.url}/v1/route", json=prompt, timeout=60).json()
    assert decision["mix"] == []
    assert decision["reason"]
