"""How likely the model held tokens: log-probabilities of what it said, or of what a prompt says."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from server.engine.types import Likelihood

_ROWS = 64
"""Rows at a time: a long prompt over a large vocabulary would else need its logits twice."""


def likelihoods(logits: torch.Tensor, tokens: Sequence[int], best: Sequence[int]) -> list[Likelihood]:
    """The likelihood of one token per row.

    Args:
        logits: `[len(tokens), vocabulary]` float32, as the model gave them.
        best: how many of the row's likeliest tokens to tell.
    """
    found: list[Likelihood] = []
    for start in range(0, len(tokens), _ROWS):
        stop = start + _ROWS
        found += _block(logits[start:stop], tokens[start:stop], best[start:stop])
    return found


def _block(logits: torch.Tensor, tokens: Sequence[int], best: Sequence[int]) -> list[Likelihood]:
    total = logits.logsumexp(dim=-1, keepdim=True)
    own = logits.gather(1, torch.tensor(tokens, device=logits.device)[:, None]) - total
    top = logits.topk(min(max(best), logits.shape[1]), dim=-1)
    rows = zip(tokens, best, own[:, 0].tolist(), top.indices.tolist(), (top.values - total).tolist(), strict=True)
    return [
        Likelihood(token, logprob, tuple(zip(indices[:count], values[:count], strict=True)))
        for token, count, logprob, indices, values in rows
    ]
