"""What is asked of every server: the same prompts, lengths and experts, in the same order."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from examples.tasks import Row

LENGTHS = (8, 16, 24, 32, 48)
"""Tokens that an answer may have."""


@dataclass(frozen=True)
class Asked:
    """One request. `expert` is None for the base; `natural` ends the answer where the model does."""

    expert: str | None
    prompt: str
    max_tokens: int
    natural: bool = False
    gold: str = ""


def mixed(rows: Mapping[str, Sequence[Row]], count: int, seed: int, exponent: float = 1.0) -> list[Asked]:
    """Requests whose experts are drawn by Zipf's law, in the order of `rows`, and whose lengths are drawn evenly.

    Seeds share the experts and the lengths, so that every round is the same work; prompts differ from seed to seed and
    within a trace, so that no cache of prompts helps beyond what all prompts of a template share.

    Raises:
        ValueError: an expert has fewer rows than it is asked for.
    """
    order = random.Random(0)
    names = list(rows)
    popularity = [1 / rank**exponent for rank in range(1, len(names) + 1)]
    experts = order.choices(names, popularity, k=count)
    lengths = [order.choice(LENGTHS) for _ in range(count)]
    prompts = {name: iter(_drawn(rows[name], experts.count(name), f"{seed} {name}")) for name in names}
    return [Asked(name, next(prompts[name])["prompt"], most) for name, most in zip(experts, lengths, strict=True)]


def one_each(rows: Mapping[str, Sequence[Row]], tokens: int, seed: int) -> list[Asked]:
    """One request of `tokens` tokens for every expert."""
    return [Asked(name, _drawn(some, 1, f"{seed} {name} each")[0]["prompt"], tokens) for name, some in rows.items()]


def natural(rows: Mapping[str, Sequence[Row]], count: int) -> list[Asked]:
    """The first rows of every expert, to be answered in as many tokens as it likes."""
    return [
        Asked(name, row["prompt"], max(LENGTHS), natural=True, gold=row["answer"])
        for name, some in rows.items()
        for row in some[:count]
    ]


def _drawn(rows: Sequence[Row], count: int, seed: str) -> list[Row]:
    if len(rows) < count:
        raise ValueError(f"{count} prompts are asked for, and there are {len(rows)}")
    return random.Random(seed).sample(list(rows), count)
