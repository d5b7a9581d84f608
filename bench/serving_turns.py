"""What the parts of `bench.serving` share: streams through an engine, and works that are timed in turns."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from server.engine.engine import TransformersEngine
from server.engine.types import EngineRequest, SamplingParams
from store.mix import Mix

PROMPT = "Once upon a time there was a small town by the sea, and"

Work = Callable[[], Awaitable[int]]
"""Does something, and tells how many tokens it has made."""


def request(engine: TransformersEngine, mix: Mix, tokens: int, prompt: Sequence[int] = ()) -> EngineRequest:
    """A greedy stream of exactly so many tokens."""
    asked = tuple(prompt) or tuple(engine.tokenizer.encode(PROMPT))
    return EngineRequest(asked, SamplingParams(tokens, 0.0, ignore_eos=True), mix)


async def streams(engine: TransformersEngine, mixes: list[Mix], tokens: int, prompt: Sequence[int] = ()) -> int:
    """One stream per mix, all together."""

    async def one(mix: Mix) -> int:
        return len([event async for event in engine.submit(request(engine, mix, tokens, prompt))])

    return sum(await asyncio.gather(*(one(mix) for mix in mixes)))


async def in_turns(works: Mapping[str, Work], rounds: int) -> dict[str, list[float]]:
    """Tokens per second of each, in every round but one before the first. Every other round runs the other way round,
    so that neither what a work leaves behind nor a machine that slows down favours one of them."""
    speeds: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(rounds + 1):
        order = list(works.items())
        for name, work in order if turn % 2 else reversed(order):
            began = time.perf_counter()
            made = await work()
            if turn:
                speeds[name].append(made / (time.perf_counter() - began))
    return speeds


def compared(what: str, against: str, speeds: Mapping[str, list[float]]) -> dict[str, Any]:
    """A row: two medians, and the ratio over the rounds: its median, the least and the most."""
    ratios = [ours / theirs for ours, theirs in zip(speeds[what], speeds[against], strict=True)]
    return {
        "what": what, "tok/s": statistics.median(speeds[what]), "against": against,
        "its tok/s": statistics.median(speeds[against]), "ratio": statistics.median(ratios),
        "least": min(ratios), "most": max(ratios),
    }  # fmt: skip
