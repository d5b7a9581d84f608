"""Logits → tokens, each row by its own request's rules and its own random stream.

Greedy rows cost one `argmax` whatever their neighbours ask for; all others are edited and drawn together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Rows
from dataclasses import dataclass

import numpy as np
import torch

from server.engine.draw import Rules, draw, uniforms
from server.engine.likelihood import likelihoods
from server.engine.logit_edits import edit, edited_rows
from server.engine.sequence import Sequence
from server.engine.types import Likelihood


@dataclass(frozen=True)
class Sampled:
    """A chosen token."""

    token: int
    likelihood: Likelihood | None = None
    """Where the request asks for it."""


def sample(logits: torch.Tensor, sequences: Rows[Sequence]) -> list[Sampled | None]:
    """Choose one token per row.

    Args:
        logits: `[len(sequences), vocabulary]` float32; left as they are.
        sequences: the row's requests.

    Returns:
        A token per row; None where the row holds NaN or no finite value at all, which only a broken expert causes.
    """
    edited = edited_rows(sequences)
    random = [row for row, sequence in enumerate(sequences) if not sequence.request.sampling.greedy]
    if not edited and not random and logits.device.type == "cpu" and logits.dtype is torch.float32:
        return _sampled(logits, sequences, _most_likely(logits))
    return _sampled(logits, sequences, _chosen(logits, sequences, edited, random))


@torch.inference_mode()
def _chosen(logits: torch.Tensor, sequences: Rows[Sequence], edited: list[int], random: list[int]) -> list[int | None]:
    """A token per row, of which some are edited, and some drawn; None where nothing is finite."""
    best, chosen = _largest(logits)
    if edited:
        at = torch.tensor(edited, device=logits.device)
        rows = logits[at]
        edit(rows, [sequences[row] for row in edited])
        best[at], chosen[at] = _largest(rows)
        if random:
            logits = logits.index_copy(0, at, rows)
    sane = best.isfinite()
    if random:
        # A row that is not sane is drawn like the others, from zeros: leaving it out would cost a synchronisation.
        at = torch.tensor(random, device=logits.device)
        rows = logits if len(random) == len(sequences) else logits[at]
        rows = torch.where(sane[at, None], rows, 0.0)
        chosen[at] = draw(rows, _rules([sequences[row] for row in random]))
    return [token if fine else None for token, fine in zip(chosen.tolist(), sane.tolist(), strict=True)]


def _sampled(logits: torch.Tensor, sequences: Rows[Sequence], tokens: Rows[int | None]) -> list[Sampled | None]:
    told = _told(logits, sequences, tokens)
    return [None if token is None else Sampled(token, told.get(row)) for row, token in enumerate(tokens)]


def _most_likely(logits: torch.Tensor) -> list[int | None]:
    """Of each row in host memory, None where it is not finite. On a CPU every call to PyTorch counts: a step of one row
    takes as long as some hundred of them."""
    rows = logits.numpy()
    chosen = rows.argmax(axis=-1).tolist()
    return [token if math.isfinite(row[token]) else None for row, token in zip(rows, chosen, strict=True)]


def _largest(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest number of each row and where it is. NaN is larger than everything."""
    if logits.device.type != "cpu" or logits.dtype is not torch.float32:
        return logits.max(dim=-1)
    # A tenth of the time that PyTorch takes, and on one thread: none is waited for.
    chosen = torch.from_numpy(logits.numpy().argmax(axis=-1))
    return logits.gather(1, chosen[:, None])[:, 0], chosen


def _told(logits: torch.Tensor, sequences: Rows[Sequence], tokens: Rows[int | None]) -> dict[int, Likelihood]:
    """The likelihoods of the chosen tokens, by row, where a request asks for them."""
    asked = [
        (row, token, best)
        for row, (sequence, token) in enumerate(zip(sequences, tokens, strict=True))
        if token is not None and (best := sequence.request.sampling.logprobs) is not None
    ]
    if not asked:
        return {}
    rows, chosen, counts = zip(*asked, strict=True)
    with torch.inference_mode():
        return dict(zip(rows, likelihoods(logits[list(rows)], chosen, counts), strict=True))


def _rules(sequences: Rows[Sequence]) -> Rules:
    """The sampling parameters of several requests, as vectors."""
    sampling = [sequence.request.sampling for sequence in sequences]
    seeds = np.array([sequence.seed for sequence in sequences], dtype=np.uint64)
    counters = np.array([sequence.output_length for sequence in sequences], dtype=np.uint64)
    temperature, top_p, min_p = np.array([(s.temperature, s.top_p, s.min_p) for s in sampling], dtype=np.float32).T
    top_k = np.array([s.top_k for s in sampling], dtype=np.int64)
    return Rules(temperature, top_k, top_p, min_p, uniforms(seeds, counters))
