"""Pack (prompt, answer) samples into one row whose shared prefix is computed once.

Short tasks behind a chat template repeat themselves: the default system turn and the question's first words are
the same in every sample. Attention is causal, so those tokens have the same hidden states whatever follows; one
copy serves all samples. And one row without padding spends no work on padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sample:
    """Token ids of one sample, neither part empty; the prompt's last token predicts the answer's first."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(frozen=True)
class Packed:
    """One row of T tokens.

    Attributes:
        input_ids, position_ids: int64 `[1, T]`.
        visible: bool `[1, 1, T, T]`; row t may attend to column s.
        sources: int64 `[N]`, the positions whose logits predict.
        targets: int64 `[N]`, the tokens they must predict.
    """

    input_ids: Tensor
    position_ids: Tensor
    visible: Tensor
    sources: Tensor
    targets: Tensor


def pack(samples: Sequence[Sample]) -> Packed:
    """Pack samples into one row. What predicts follows from the layout, never from token values: EOS is also
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
    return Packed(
        input_ids=torch.tensor([ids]),
        position_ids=torch.tensor([positions]),
        visible=visible[None, None],
        sources=torch.tensor(sources),
        targets=torch.tensor(targets),
    )


def additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to the attention scores: 0 where visible, the lowest finite value elsewhere."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(~visible, torch.finfo(dtype).min)


def _shared_prefix(samples: Sequence[Sample]) -> int:
    """Number of leading prompt tokens that all samples share, short of any prompt's last token, which must stay
    the sample's own since its logits are used."""
    columns = zip(*(sample.prompt[:-1] for sample in samples), strict=False)
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
