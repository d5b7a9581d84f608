"""What the engine tells of itself: how a request came to its first token, and what is going on."""

from __future__ import annotations

import asyncio

from server.engine.types import EngineRequest, SamplingParams, TokenEvent
from store.mix import Mix
from tests.engine.conftest import Library, running


def test_times_are_told_once_and_in_order(library: Library) -> None:
    mix = Mix.of({library.add(5): 1.0})

    async def body() -> None:
        async with running(library) as engine:
            request = EngineRequest((5, 6, 7), SamplingParams(max_tokens=4, temperature=0), mix)
            events: list[TokenEvent] = [event async for event in engine.submit(request)]
            first, *rest = [event.timing for event in events]
            assert first is not None
            assert rest == [None] * (len(events) - 1)
            assert first.arrived <= first.granted <= first.scheduled <= first.answered
            assert first.granted > first.arrived, "it had to be loaded"
            assert 0 <= first.patching <= first.answered - first.scheduled

    asyncio.run(body())


def test_the_view_shows_lanes_and_experts(library: Library) -> None:
    digest = library.add(6)
    mix = Mix.of({digest: 1.0})

    async def body() -> None:
        async with running(library) as engine:
            assert (await engine.inspect())["lanes"] == []
            request = EngineRequest((5, 6, 7), SamplingParams(max_tokens=300, ignore_eos=True), mix)
            stream = engine.submit(request)
            await anext(stream)
            seen = await engine.inspect()
            (lane,) = seen["lanes"]
            assert (lane["mix"], lane["running"], lane["waiting"]) == ({digest: 1.0}, 1, 0)
            (sequence,) = lane["sequences"]
            assert (sequence["state"], sequence["prompt_tokens"], sequence["max_tokens"]) == ("running", 3, 300)
            assert sequence["output_tokens"] >= 1
            (expert,) = seen["experts"]
            assert (expert["digest"], expert["used_by"], expert["decoded"]) == (digest, 1, True)
            assert "tokens" not in sequence
            assert await engine.base_sha256() == engine.check_integrity()[0]
            await stream.aclose()
            while (await engine.inspect())["lanes"]:
                pass

    asyncio.run(body())
