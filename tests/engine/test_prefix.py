"""Beginnings that prompts share are computed once, and no answer shows it."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace

import pytest

from server.engine.engine import TransformersEngine
from server.engine.kv_cache import BLOCK_TOKENS
from server.engine.options import Mode
from server.engine.types import EngineRequest, SamplingParams
from store.errors import ExpertUnavailableError
from store.mix import BASE_MIX, Mix
from tests.engine.conftest import SETTINGS, Library, collect, running, until

LONG = tuple(range(50))
"""Three full blocks and two tokens."""


async def ask(
    engine: TransformersEngine, prompt: tuple[int, ...], mix: Mix = BASE_MIX, tenant: str | None = None, most: int = 6
) -> tuple[list[int], int]:
    """The answer, and how many tokens of the prompt were in the cache."""
    request = EngineRequest(prompt, SamplingParams(max_tokens=most, temperature=0.0), mix, tenant)
    events = [event async for event in engine.submit(request)]
    assert all(event.cached_tokens == 0 for event in events[1:])
    return [event.token for event in events if event.token is not None], events[0].cached_tokens


def test_only_the_same_mix_tenant_and_tokens_are_shared(library: Library) -> None:
    one, other = Mix.of({library.add(1): 1.0}), Mix.of({library.add(2): 1.0})

    async def body() -> None:
        async with running(library) as engine:
            for mix, tenant, prompt, cached in (
                (one, None, LONG, 0),
                (one, None, LONG, 48),
                (one, None, LONG[:48], 32),  # the last token is always computed
                (one, None, (*LONG[:32], 7, 7), 32),
                (one, None, (7, *LONG[1:]), 0),
                (one, "acme", LONG, 0),
                (one, "acme", LONG, 48),
                (one, "-", LONG, 0),
                (other, None, LONG, 0),  # what a name points to after a replacement
                (Mix.of({one.parts[0][0]: 0.5}), None, LONG, 0),
                (BASE_MIX, None, LONG, 0),
            ):
                answer, found = await ask(engine, prompt, mix, tenant)
                assert answer == library.greedy(mix, list(prompt), 6)
                assert found == cached
            stats = engine.stats()
            assert stats.cached_tokens == 48 + 32 + 32 + 48
            assert (stats.kv_bytes_used, stats.kv_bytes_kept > 0) == (0, True)

    asyncio.run(body())


def test_an_answer_is_found_again_when_its_conversation_goes_on(library: Library) -> None:
    async def body() -> None:
        async with running(library) as engine:
            answer, _ = await ask(engine, LONG, most=40)
            longer = (*LONG, *answer, 1, 2, 3)
            again, cached = await ask(engine, longer)
            # The last token of an answer is never run through the model.
            assert cached == (len(LONG) + len(answer) - 1) // BLOCK_TOKENS * BLOCK_TOKENS
            assert again == library.greedy(BASE_MIX, list(longer), 6)

    asyncio.run(body())


def test_answers_to_one_prompt_that_arrive_together_share_its_first_step(library: Library) -> None:
    prompt = LONG[:40]

    async def body() -> None:
        async with running(library) as engine:
            held = asyncio.Event()
            loop = asyncio.get_running_loop()
            engine._worker.post(lambda: asyncio.run_coroutine_threadsafe(held.wait(), loop).result(30) and None)
            asked = [asyncio.create_task(ask(engine, prompt)) for _ in range(3)]
            await asyncio.sleep(0)  # all are submitted before the thread goes on
            held.set()
            answers = [await one for one in asked]
            assert [cached for _, cached in answers] == [0, 32, 32]
            assert all(answer == library.greedy(BASE_MIX, list(prompt), 6) for answer, _ in answers)
            assert engine.stats().prompt_tokens == 40 + 8 + 8

    asyncio.run(body())


def test_it_can_be_turned_off_and_spares_prompts_whose_likelihoods_are_wanted(library: Library) -> None:
    async def body() -> None:
        async with running(library, replace(SETTINGS, prefix_cache=False)) as engine:
            assert [(await ask(engine, LONG))[1] for _ in range(2)] == [0, 0]
            assert engine.stats().kv_bytes_kept == 0
        async with running(library) as engine:
            await ask(engine, LONG)
            request = EngineRequest(LONG, SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0))
            events = [event async for event in engine.submit(request)]
            assert len(events[0].prompt) == len(LONG)
            assert events[0].cached_tokens == 0

    asyncio.run(body())


def test_what_a_broken_expert_computed_is_not_kept(library: Library) -> None:
    wild = Mix.of({library.add(5, scale=1e12): 1.0})

    async def body() -> None:
        async with running(library) as engine:
            for _ in range(2):
                with pytest.raises(ExpertUnavailableError):
                    await ask(engine, LONG, wild)
            assert (engine.stats().kv_bytes_kept, engine.stats().cached_tokens) == (0, 0)

    asyncio.run(body())


@pytest.mark.parametrize("mode", Mode)
def test_random_streams_with_shared_beginnings_answer_as_without(library: Library, mode: Mode) -> None:
    """With cancels, and so little memory that sequences are preempted and what is kept is forgotten."""
    mixes = [BASE_MIX, *(Mix.of({library.add(seed): 1.0}) for seed in (1, 2)), Mix.of({library.add(3): -0.5})]
    rng = random.Random(mode.value)
    beginnings = [[rng.randrange(256) for _ in range(rng.randint(10, 70))] for _ in range(3)]
    cases = [
        ([*rng.choice(beginnings), *(rng.randrange(256) for _ in range(rng.randint(0, 20)))], rng.choice(mixes))
        for _ in range(24)
    ]

    async def body() -> None:
        async with running(library) as engine:
            block = engine._worker.cache.shape.block_bytes
        async with running(library, replace(SETTINGS, mode=mode, kv_bytes=26 * block)) as engine:
            doomed = [engine.submit(EngineRequest(tuple(p), SamplingParams(60, 0.0), m)) for p, m in cases[:5]]
            answers = asyncio.gather(*(collect(engine, prompt, mix, 24) for prompt, mix in cases))
            for stream in doomed:
                await anext(stream)
                await stream.aclose()
            for (prompt, mix), (tokens, _) in zip(cases, await answers, strict=True):
                assert tokens == library.greedy(mix, prompt, 24)
            await until(lambda: engine.stats().running == engine.stats().waiting == 0)
            stats = engine.stats()
            assert stats.kv_bytes_used == 0
            assert stats.cached_tokens > 200
            assert stats.preemptions > 0

    asyncio.run(body())
