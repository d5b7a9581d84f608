"""Training on a packed row equals training on each sample alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from examples.packing import encode, loss_of
from store.samples import Sample, pack
from tests.tiny import config, tokenizer

TOKENS = st.lists(st.integers(0, 255), min_size=1, max_size=12)
SAMPLES = st.lists(st.tuples(TOKENS, TOKENS), min_size=1, max_size=5)


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config()).eval()


@given(prefix=st.lists(st.integers(0, 255), max_size=8), pairs=SAMPLES)
@settings(max_examples=50, deadline=None)
def test_the_loss_is_that_of_the_samples_one_by_one(
    model: torch.nn.Module, prefix: list[int], pairs: list[tuple[list[int], list[int]]]
) -> None:
    samples = [Sample((*prefix, *prompt), (*answer, 256)) for prompt, answer in pairs]
    total, count = 0.0, 0
    for sample in samples:
        with torch.no_grad():
            logits = model(torch.tensor([sample.prompt + sample.answer])).logits[0, len(sample.prompt) - 1 : -1]
        total += float(torch.nn.functional.cross_entropy(logits, torch.tensor(sample.answer), reduction="sum"))
        count += len(sample.answer)
    with torch.no_grad():
        packed = float(loss_of(model, pack(samples)))
    assert packed == pytest.approx(total / count, rel=1e-4)


def test_every_answer_ends_with_a_trained_end_of_turn() -> None:
    samples = [encode(tokenizer(), prompt, "yes") for prompt in ("one", "another")]
    assert all(sample.answer[-1] == 256 for sample in samples)
    assert pack(samples).targets.tolist().count(256) == len(samples)
