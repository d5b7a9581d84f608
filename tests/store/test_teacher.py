"""What a lesson says is what the fine-tune says of each sample alone, in whichever layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from store.teacher import Lesson, listen, mean_kl
from tests.tiny import save_base, tokenizer

PROMPTS = ["one", "two and a half", "three, which is more", "four"] * 3


@pytest.fixture(scope="module", params=["llama", "qwen2", "gemma3"])
def heard(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, list[Lesson]]:
    from transformers import AutoModelForCausalLM

    folder: Path = save_base(tmp_path_factory.mktemp(request.param) / "base", request.param)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return request.param, model, listen(model, tokenizer(), PROMPTS)


def test_models_that_obey_any_mask_hear_packed_rows(heard: tuple[str, Any, list[Lesson]]) -> None:
    architecture, _, lessons = heard
    packed = architecture != "gemma3"  # its window of 8 tokens is shorter than the samples
    assert len(lessons) == 2
    assert all((lesson.tokens.shape[0] == 1) == packed for lesson in lessons)


def test_a_lesson_s_words_are_those_of_each_sample_alone(heard: tuple[str, Any, list[Lesson]]) -> None:
    _, model, lessons = heard
    expected = []
    for prompt in dict.fromkeys(PROMPTS):
        text = tokenizer().apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        row = tokenizer()(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            expected.append(model(row).logits[0, -1].log_softmax(-1))
    spoken = torch.cat([lesson.teacher for lesson in lessons])
    for first_word in expected:
        assert float((spoken - first_word).abs().amax(-1).min()) < 1e-4
    assert mean_kl(model, lessons) == pytest.approx(0.0, abs=1e-6)
