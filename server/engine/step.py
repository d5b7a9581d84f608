"""One step of the model: scheduled work in, sampled tokens out."""

from __future__ import annotations

from collections.abc import Sequence as Items

import torch

from server.engine.attention import AttentionBatch, Segment
from server.engine.kv_cache import KVCache
from server.engine.likelihood import likelihoods
from server.engine.model import BaseModel
from server.engine.sampler import Sampled, sample
from server.engine.scheduler import Work
from server.engine.sequence import Sequence


def run_step(model: BaseModel, cache: KVCache, work: Items[Work]) -> list[Sampled | None]:
    """Run every sequence's next tokens through the model, side by side in one row; note the likelihoods of prompts.

    Returns:
        For each piece of work that reached its sequence's last token, in order, the token sampled there; None where
        the logits are not finite.
    """
    tokens: list[int] = []
    segments: list[Segment] = []
    rows: list[int] = []
    scored_rows: list[int] = []
    scored: list[tuple[Sequence, range]] = []
    for item in work:
        sequence, start = item.sequence, len(tokens)
        tokens += sequence.tokens[sequence.computed : sequence.computed + item.count]
        segments.append(Segment(start, len(tokens), sequence.computed, tuple(sequence.blocks)))
        if item.samples:
            rows.append(len(tokens) - 1)
        scored.append((sequence, sequence.to_score(item.count)))
        scored_rows += [start + token - 1 - sequence.computed for token in scored[-1][1]]
    logits = model.forward(tokens, AttentionBatch(segments, cache, model.device), rows + scored_rows)
    score(logits[len(rows) :], scored)
    return sample(logits[: len(rows)], [item.sequence for item in work if item.samples])


def score(logits: torch.Tensor, scored: Items[tuple[Sequence, range]]) -> None:
    """Note the likelihoods of prompt tokens in their sequences.

    Args:
        logits: `[tokens, vocabulary]` float32, of the position before each token, sequence after sequence.
        scored: sequences with the range of their tokens.
    """
    start = 0
    for sequence, places in scored:
        best = sequence.request.sampling.prompt_logprobs
        if best is not None and places:
            stop = start + len(places)
            tokens = sequence.tokens[places.start : places.stop]
            sequence.scored += likelihoods(logits[start:stop], tokens, [best] * len(tokens))
            start = stop
