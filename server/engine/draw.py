"""Truncation and the draw: one token for each of many rows, each by its own rules and its own random numbers.

A token's fate depends on its row alone: which tokens stay is a threshold on the row's weights, so tokens that are
equally likely stay or go together, and the draw inverts the row's cumulative distribution in the order of token ids.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

_FIRST_CANDIDATES = 256
"""Candidates that a nucleus is looked for in: partial sorting of 256 costs a twentieth of sorting a vocabulary."""
_MORE_CANDIDATES = 16

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


@dataclass(frozen=True)
class Rules:
    """How each row is drawn: vectors of one length, in host memory, so that asking what they hold costs no
    synchronisation."""

    temperature: npt.NDArray[np.float32]
    """> 0."""
    top_k: npt.NDArray[np.int64]
    """0 is no limit."""
    top_p: npt.NDArray[np.float32]
    """0 < p ≤ 1."""
    min_p: npt.NDArray[np.float32]
    """0 ≤ p ≤ 1: tokens less likely than this share of the likeliest go."""
    uniforms: npt.NDArray[np.float32]
    """0 ≤ u < 1: the row's random number."""


def uniforms(seeds: npt.NDArray[np.uint64], counters: npt.NDArray[np.uint64]) -> npt.NDArray[np.float32]:
    """The `counters[i]`-th random number, in [0, 1), of the stream `seeds[i]`.

    SplitMix64, which can be entered anywhere: with no state to keep, a sequence that was preempted, or shares its batch
    with others, draws as if alone.
    """
    with np.errstate(over="ignore"):
        start = _mixed(seeds + _GOLDEN)
        bits = _mixed(start + (counters + np.uint64(1)) * _GOLDEN)
    return ((bits >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)).astype(np.float32)


def draw(logits: torch.Tensor, rules: Rules) -> torch.Tensor:
    """Choose one token per row.

    Args:
        logits: `[rows, vocabulary]` float32; -inf is allowed, but not in a whole row. Left as they are.
        rules: of as many rows.

    Returns:
        `[rows]` int64.
    """
    # The likeliest token has weight 1, so that nothing overflows whatever the temperature. In place from here on: a
    # fresh array of this size costs more in page faults than the arithmetic on it.
    weights = logits - logits.amax(dim=-1, keepdim=True)
    weights.div_(on_device(rules.temperature, logits.device)[:, None]).exp_()
    floor = thresholds(weights, rules)
    if floor is not None:
        weights.masked_fill_(weights < floor[:, None], 0.0)
    mass = weights.cumsum_(dim=-1)
    total = mass[:, -1]
    # Strictly below the total: rounding must not point behind the last token that stays.
    below = total.nextafter(torch.zeros_like(total))
    target = torch.minimum(on_device(rules.uniforms, logits.device) * total, below)
    return torch.searchsorted(mass, target[:, None], right=True)[:, 0]


def thresholds(weights: torch.Tensor, rules: Rules) -> torch.Tensor | None:
    """The smallest weight that stays in each row: min-p, then top-k, then top-p of what those two leave.

    Args:
        weights: `[rows, vocabulary]` float32, proportional to the probabilities, the largest of each row 1.

    Returns:
        `[rows]` float32, or None if all stay. A token stays if all likelier ones have less than `top_p` of the mass.
    """
    vocabulary, device = weights.shape[1], weights.device
    limited = np.flatnonzero((rules.top_k > 0) & (rules.top_k < vocabulary))
    nucleus = np.flatnonzero(rules.top_p < 1.0)
    if not (limited.size or nucleus.size or rules.min_p.any()):
        return None
    floor = on_device(rules.min_p, device).clone()
    if limited.size:
        at, rank = on_device(limited, device), rules.top_k[limited]
        best = weights[at].topk(int(rank.max()), dim=-1).values
        kth = best.gather(1, on_device(rank - 1, device)[:, None])[:, 0]
        floor[at] = torch.maximum(floor[at], kth)
    if nucleus.size:
        at = on_device(nucleus, device)
        rows = weights if nucleus.size == len(weights) else weights[at]
        floor[at] = _nucleus(rows, floor[at], on_device(rules.top_p[nucleus], device))
    return floor


def _nucleus(weights: torch.Tensor, floor: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """`floor`, raised to where the nucleus of the tokens above it ends."""
    goal = top_p * weights.where(weights >= floor[:, None], 0.0).sum(dim=-1)
    raised = floor.clone()
    searching = torch.arange(len(weights), device=weights.device)
    count = min(_FIRST_CANDIDATES, weights.shape[1])
    while searching.numel():
        rows = weights if len(searching) == len(weights) else weights[searching]
        best = rows.topk(count, dim=-1).values
        mass = best.where(best >= floor[searching, None], 0.0)
        before = mass.cumsum(dim=-1) - mass
        last = (before < goal[searching, None]).sum(dim=-1).clamp(min=1) - 1
        found = (last < count - 1) | (count == weights.shape[1])
        raised[searching[found]] = best[found].gather(1, last[found, None])[:, 0]
        searching = searching[~found]
        count = min(count * _MORE_CANDIDATES, weights.shape[1])
    return torch.maximum(floor, raised)


def on_device(array: npt.NDArray[np.generic], device: torch.device) -> torch.Tensor:
    """The array as a tensor."""
    return torch.from_numpy(np.ascontiguousarray(array)).to(device)


def _mixed(bits: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    bits = (bits ^ (bits >> np.uint64(30))) * _MIX[0]
    bits = (bits ^ (bits >> np.uint64(27))) * _MIX[1]
    return bits ^ (bits >> np.uint64(31))
