"""What requests change in their own logits before a token is chosen: penalties, biases, grammars, bans.

Everything is gathered into flat lists of (row, token) and applied with one indexed operation for all rows, so the
price goes with the number of tokens that are touched, not with the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from typing import TYPE_CHECKING

import numpy as np
import torch

from server.engine.draw import on_device
from server.engine.sequence import Sequence
from server.engine.token_counts import TokenCounts

if TYPE_CHECKING:
    from llguidance import LLMatcher


def edited_rows(sequences: Rows[Sequence]) -> list[int]:
    """The rows whose logits must not be taken as they are."""
    return [
        row
        for row, sequence in enumerate(sequences)
        if _penalised(sequence) or _biased(sequence) or _early(sequence) or sequence.grammar is not None
    ]


def edit(logits: torch.Tensor, sequences: Rows[Sequence]) -> None:
    """Apply to each row, in place, what its request asks for: penalties, then biases, then grammar and bans.

    Args:
        logits: `[len(sequences), vocabulary]` float32, contiguous.
    """
    flat = logits.view(-1)
    vocabulary = logits.shape[1]
    _penalise(flat, [(row, s) for row, s in enumerate(sequences) if _penalised(s)], vocabulary)
    biased = [(row * vocabulary, s.request.sampling.logit_bias) for row, s in enumerate(sequences) if _biased(s)]
    if biased:
        at = torch.tensor([start + token for start, bias in biased for token, _ in bias])
        add = torch.tensor([value for _, bias in biased for _, value in bias], dtype=torch.float32)
        flat.index_add_(0, at.to(flat.device), add.to(flat.device))
    _follow(logits, [(row, s.grammar) for row, s in enumerate(sequences) if s.grammar is not None])
    banned = [row * vocabulary + token for row, s in enumerate(sequences) if _early(s) for token in s.stop_tokens]
    if banned:
        flat[torch.tensor(banned, device=flat.device)] = -torch.inf


def _follow(logits: torch.Tensor, grammars: list[tuple[int, LLMatcher]]) -> None:
    """Leave each row only the tokens with which its grammar can go on."""
    if not grammars:
        return
    masks = [np.frombuffer(grammar.compute_bitmask(), np.uint8) for _, grammar in grammars]
    allowed = np.unpackbits(np.stack(masks), axis=1, count=logits.shape[1], bitorder="little").astype(bool)
    at = torch.tensor([row for row, _ in grammars], device=logits.device)
    logits[at] = logits[at].where(on_device(allowed, logits.device), -torch.inf)


def _penalised(sequence: Sequence) -> bool:
    return sequence.counts is not None


def _biased(sequence: Sequence) -> bool:
    return bool(sequence.request.sampling.logit_bias)


def _early(sequence: Sequence) -> bool:
    return sequence.grammar is None and sequence.output_length < sequence.request.sampling.min_tokens


def _penalise(flat: torch.Tensor, penalised: list[tuple[int, Sequence]], vocabulary: int) -> None:
    if not penalised:
        return
    tokens, counts, sizes = [], [], []
    for row, sequence in penalised:
        seen = sequence.counts
        assert isinstance(seen, TokenCounts)
        seen.catch_up(sequence.tokens)
        tokens.append(seen.tokens + row * vocabulary)
        counts.append(seen.counts)
        sizes.append(len(seen.tokens))
    rules = [s.request.sampling for _, s in penalised]
    table = np.array([(r.repetition_penalty, r.presence_penalty, r.frequency_penalty) for r in rules], dtype=np.float32)
    repetition, presence, frequency = on_device(np.repeat(table, sizes, axis=0).T, flat.device)
    at, count = on_device(np.concatenate(tokens), flat.device), on_device(np.concatenate(counts), flat.device)
    logit = flat[at]
    logit = torch.where(logit > 0.0, logit / repetition, logit * repetition)
    flat[at] = logit - frequency * count - presence * (count > 0)
