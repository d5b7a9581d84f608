"""Conversations of two turns: does the second find whom it should, with and without holding on to the first?

*bare*: another prompt of the same task without its instruction. *follow-up*: hand-written, "And on Sundays?"
(`data/follow_ups.json`). *other task*: a templated prompt of another task. *no task*: an everyday question.
"""

from __future__ import annotations

import json
import random
from collections import defaultdict
from pathlib import Path

import numpy as np

from bench.report import Row
from bench.routing_prompts import RoutingPrompts
from bench.unrelated import everyday_prompts
from router.options import RouteOptions
from router.router import Router

FOLLOW_UPS = Path(__file__).resolve().parent / "data" / "follow_ups.json"
EACH, OPENINGS = 30, 3

Case = tuple[str, str, str, str | None]
"""A kind, the first question, the second, and who should answer that; None is the base."""


def follow_ups() -> dict[str, list[str]]:
    """Task → second questions that say little by themselves."""
    found: dict[str, list[str]] = json.loads(FOLLOW_UPS.read_text(encoding="utf-8"))
    return found


def cases(prompts: RoutingPrompts) -> list[Case]:
    """All conversations."""
    rng, found, everyday, templated = random.Random(0), list[Case](), everyday_prompts(), prompts.test["templated"]
    for name, first in templated.items():
        others = [other for other in templated if other != name]
        for i in range(min(EACH, len(first))):
            other = rng.choice(others)
            found.append(("bare", first[i], prompts.test["bare"][name][-1 - i], name))
            found.append(("other task", first[i], templated[other][-1 - i], other))
            found.append(("no task", first[i], rng.choice(everyday), None))
        for i, second in enumerate(follow_ups()[name]):
            found += [("follow-up", first[(OPENINGS * i + j) % len(first)], second, name) for j in range(OPENINGS)]
    return found


async def conversation_rows(router: Router, prompts: RoutingPrompts) -> list[Row]:
    """Share of second questions that found whom they should, by kind."""
    rows: list[Row] = []
    for sticky in (False, True):
        right = defaultdict[str, list[bool]](list)
        for kind, first, second, wanted in cases(prompts):
            decision = await router.route(second, RouteOptions(sticky=sticky), earlier=[first])
            right[kind].append(decision.mix.parts == (((wanted, 1.0),) if wanted else ()))
        shares = {kind: float(np.mean(found)) for kind, found in right.items()}
        rows.append({"conversation": "held" if sticky else "each question alone", **shares})
    return rows
