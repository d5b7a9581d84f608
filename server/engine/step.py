"""One step of the model: scheduled work in, sampled tokens out."""

from __future__ import annotations

from collections.abc import Sequence as Items

from server.engine.attention import AttentionBatch, Segment
from server.engine.kv_cache import KVCache
from server.engine.model import BaseModel
from server.engine.sampler import sample
from server.engine.scheduler import Work


def run_step(model: BaseModel, cache: KVCache, work: Items[Work]) -> list[int | None]:
    """Run every sequence's next tokens through the model, side by side in one row.

    Returns:
        For each piece of work that reached its sequence's last token, in order, the token sampled there; None where
        the logits are not finite.
    """
    tokens: list[int] = []
    segments: list[Segment] = []
    rows: list[int] = []
    for item in work:
        sequence, start = item.sequence, len(tokens)
        tokens += sequence.tokens[sequence.computed : sequence.computed + item.count]
        segments.append(Segment(start, len(tokens), sequence.computed, tuple(sequence.blocks)))
        if item.samples:
            rows.append(len(tokens) - 1)
    logits = model.forward(tokens, AttentionBatch(segments, cache, model.device), rows)
    return sample(logits, [item.sequence for item in work if item.samples])
