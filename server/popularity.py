"""How often a cache that drops what was used least recently holds what is asked for, by how popular things are."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Shares = npt.NDArray[np.float64]
"""`[n]`, the share of requests that each expert gets, the most popular first; they add up to 1."""


def zipf(experts: int, exponent: float) -> Shares:
    """Shares by Zipf's law: the i-th most popular expert gets a share in proportion to i^−exponent.

    Args:
        exponent: 0 is no preference at all; about 1 is what is often seen of models and pages.
    """
    weights = np.arange(1, experts + 1, dtype=np.float64) ** -exponent
    shares: Shares = weights / weights.sum()
    return shares


def hit_rate(shares: Shares, room: float) -> float:
    """The share of requests that an LRU cache answers once it is warm, by Che's approximation.

    A thing is in the cache if it was asked for within the time T that the cache takes to turn over; T is what makes
    the expected number of things in it `room` (Che, Tung, Wang: Hierarchical Web Caching Systems, IEEE JSAC 2002,
    §III; Fricker, Robert, Roberts: A versatile and accurate approximation for LRU cache performance, ITC 2012). It
    assumes that requests are independent of each other and things of one size.

    Args:
        room: how many things fit.
    """
    if room <= 0:
        return 0.0
    if room >= len(shares):
        return 1.0
    low, high = 0.0, 1.0
    while _held(shares, high) < room:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _held(shares, middle) < room else (low, middle)
    return float((shares * -np.expm1(-shares * high)).sum())


def divided_hit_rate(shares: Shares, room: float, caches: int) -> float:
    """As `hit_rate`, of all requests, where so many caches divide the things among them by a hash.

    Which things a hash sends where is chance; here they go to one cache after the other.

    Args:
        room: how many things fit into each.
    """
    parts = [shares[first::caches] for first in range(min(caches, len(shares)))]
    return float(sum(own.sum() * hit_rate(own / own.sum(), room) for own in parts))


def distinct(shares: Shares, draws: int) -> float:
    """How many different things are expected among so many requests."""
    return float(-np.expm1(draws * np.log1p(-np.minimum(shares, 1 - 1e-12))).sum())


def _held(shares: Shares, time: float) -> float:
    return float(-np.expm1(-shares * time).sum())
