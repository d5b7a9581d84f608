"""Training samples of a task and the loss over a packed batch of them (`store.samples`)."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.functional import cross_entropy

from store.samples import Packed, Sample, additive


def prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    """Token ids of a user message as it is served: the model's chat template, its default system turn included,
    up to and with the header of the assistant's turn."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def encode(tokenizer: Any, prompt: str, answer: str) -> Sample:
    """One training sample. The answer is tokenised by itself, because generation starts on a token border."""
    ids: list[int] = tokenizer(answer, add_special_tokens=False)["input_ids"]
    return Sample(tuple(prompt_ids(tokenizer, prompt)), (*ids, tokenizer.eos_token_id))


def loss_of(model: Any, batch: Packed) -> Tensor:
    """Mean cross entropy over the answer tokens, a scalar. Logits exist at their positions only: at a vocabulary
    of 49k the rest would cost more than some layers do."""
    device = model.device
    sources, targets = batch.sources.to(device), batch.targets.to(device)
    logits = model(
        input_ids=batch.input_ids.to(device),
        position_ids=batch.position_ids.to(device),
        attention_mask=additive(batch.visible.to(device), model.dtype),
        logits_to_keep=sources,
        use_cache=False,
    ).logits
    return cross_entropy(logits[0].float(), targets)
