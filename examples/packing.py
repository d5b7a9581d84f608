"""Pack a batch of (prompt, answer) samples into one row whose shared prefix is computed once.

Short tasks behind a chat template repeat themselves: the default system turn and the question's first words are
the same in every sample. Attention is causal, so those tokens have the same hidden states whatever follows; one
copy serves all samples. And one row without padding spends no work on padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sample:
    """Token ids of one training sample; `answer` ends with the EOS token."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(frozen=True)
class PackedBatch:
    """One row of T tokens.

    input_ids, position_ids: int64 [1, T]; mask: float [1, 1, T, T], added to the attention scores;
    sources: int64 [N], the positions whose logits predict; targets: int64 [N], the tokens they must predict.
    """

    input_ids: Tensor
    position_ids: Tensor
    mask: Tensor
    sources: Tensor
    targets: Tensor

    def to(self, device: torch.device) -> PackedBatch:
        """The same batch on `device`."""
        return PackedBatch(*(getattr(self, field.name).to(device) for field in fields(self)))


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


def pack(samples: Sequence[Sample]) -> PackedBatch:
    """Pack samples into one row. Loss positions follow from the layout, never from token values: EOS is also
    the padding token of many models, and a mask on `ids != pad` would teach the model never to stop."""
    shared = _shared_prefix(samples)
    ids = list(samples[0].prompt[:shared])
    positions = list(range(shared))
    owner = [-1] * shared  # the prefix belongs to nobody and is seen by everybody
    sources: list[int] = []
    targets: list[int] = []
    for index, sample in enumerate(samples):
        own = [*sample.prompt[shared:], *sample.answer[:-1]]  # the last token predicts nothing: left out
        first = len(ids) + len(sample.prompt) - shared - 1
        sources.extend(range(first, first + len(sample.answer)))
        targets.extend(sample.answer)
        ids.extend(own)
        positions.extend(range(shared, shared + len(own)))
        owner.extend([index] * len(own))
    row = torch.tensor(owner)
    visible = ((row[:, None] == row[None, :]) | (row[None, :] == -1)).tril()
    mask = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    return PackedBatch(
        input_ids=torch.tensor([ids]),
        position_ids=torch.tensor([positions]),
        mask=mask[None, None],
        sources=torch.tensor(sources),
        targets=torch.tensor(targets),
    )


def loss_of(model: Any, batch: PackedBatch) -> Tensor:
    """Mean cross entropy over the answer tokens, a scalar. Logits exist at their positions only: at a vocabulary
    of 49k the rest would cost more than some layers do."""
    logits = model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        attention_mask=batch.mask,
        logits_to_keep=batch.sources,
        use_cache=False,
    ).logits
    return torch.nn.functional.cross_entropy(logits[0].float(), batch.targets)


def _shared_prefix(samples: Sequence[Sample]) -> int:
    """Number of leading prompt tokens that all samples share, short of any prompt's last token, which must stay
    the sample's own since its logits are used."""
    columns = zip(*(sample.prompt[:-1] for sample in samples), strict=False)
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
