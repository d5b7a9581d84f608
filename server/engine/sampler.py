"""Logits → tokens, each row by its own request's rules and its own random stream."""

from __future__ import annotations

from collections.abc import Sequence as Rows

import torch

from server.engine.sequence import Sequence


def sample(logits: torch.Tensor, sequences: Rows[Sequence]) -> list[int | None]:
    """Choose one token per row.

    Args:
        logits: `[len(sequences), vocabulary]` float32.
        sequences: the row's requests.

    Returns:
        A token id per row; None where the row holds NaN or no finite value at all, which only a broken expert causes.
    """
    greedy = logits.argmax(dim=-1).tolist()
    finite = (~logits.isnan()).all(dim=-1) & logits.isfinite().any(dim=-1) & ~logits.isposinf().any(dim=-1)
    chosen: list[int | None] = []
    for row, (sequence, sane) in enumerate(zip(sequences, finite.tolist(), strict=True)):
        if not sane:
            chosen.append(None)
        elif sequence.generator is None:
            chosen.append(greedy[row])
        else:
            chosen.append(_draw(logits[row].cpu(), sequence, sequence.generator))
    return chosen


def _draw(logits: torch.Tensor, sequence: Sequence, generator: torch.Generator) -> int:
    """Nucleus sampling: the smallest set of most likely tokens whose mass reaches `top_p`, at `temperature`."""
    sampling = sequence.request.sampling
    probabilities = torch.softmax(logits / sampling.temperature, dim=-1)
    if sampling.top_p < 1.0:
        ordered, order = probabilities.sort(descending=True, stable=True)
        before = ordered.cumsum(dim=0) - ordered
        ordered[before >= sampling.top_p] = 0.0
        return int(order[torch.multinomial(ordered, 1, generator=generator)])
    return int(torch.multinomial(probabilities, 1, generator=generator))
