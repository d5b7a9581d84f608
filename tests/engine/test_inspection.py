"""What the engine tells of itself: how a request came to its first token, and what is going on."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace
from typing import Any

import pytest
from pydantic import TypeAdapter

from server.api.debug import EngineView
from server.engine.executor import Executor
from server.engine.inspection import beside
from server.engine.options import Mode
from server.engine.types import EngineRequest, SamplingParams, TokenEvent, TokenStream
from store.mix import Mix
from tests.engine.conftest import SETTINGS, Library, running


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
        async with running(library, replace(SETTINGS, mode=Mode.MERGED)) as engine:
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
            assert seen["weights"] == [{digest: 1.0}]
            (expert,) = seen["experts"]
            assert (expert["digest"], expert["used_by"], expert["decoded"]) == (digest, 1, True)
            assert "tokens" not in sequence
            beyond: dict[str, Any] = {"object": "engine", "stats": {}, "names": {}, "base_sha256": None}
            TypeAdapter(EngineView).validate_python(seen | beyond, strict=True)
            assert await engine.base_sha256() == engine.check_integrity()[0]
            await stream.aclose()
            while (await engine.inspect())["lanes"]:
                pass

    asyncio.run(body())


def test_a_step_that_takes_long_keeps_nobody_from_looking(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = library.add(6)
    began, go_on, run = threading.Event(), threading.Event(), Executor.run

    def slow(self: Executor, *arguments: Any) -> Any:
        began.set()
        assert go_on.wait(120)
        return run(self, *arguments)

    monkeypatch.setattr(Executor, "run", slow)

    async def body() -> None:
        async with running(library) as engine:
            request = EngineRequest((5, 6, 7), SamplingParams(max_tokens=2, ignore_eos=True), Mix.of({digest: 1.0}))
            answer = asyncio.create_task(_all(engine.submit(request)))
            await asyncio.to_thread(began.wait, 60)
            seen = await engine.inspect()
            assert seen["step_seconds"] > 0
            (lane,) = seen["lanes"]
            assert (lane["mix"], lane["running"]) == ({digest: 1.0}, 1)
            assert [expert["used_by"] for expert in seen["experts"]] == [1]
            assert await engine.base_sha256() == engine.check_integrity()[0]
            go_on.set()
            assert len(await answer) == 2
            while (seen := await engine.inspect())["lanes"]:
                pass
            assert seen["step_seconds"] is None

    asyncio.run(body())


def test_whoever_looks_from_beside_sees_a_busy_engine_whole(library: Library) -> None:
    """Lanes, sequences and experts come and go while another thread reads them all the time."""
    digests = [library.add(seed) for seed in (6, 7, 8)]

    async def body() -> None:
        async with running(library) as engine:
            over, views = threading.Event(), list[dict[str, Any]]()

            def look() -> None:
                while not over.wait(0.0005):
                    views.append(beside(engine._worker.view))

            looking = asyncio.create_task(asyncio.to_thread(look))
            for round_ in range(4):
                mixes = [Mix.of({digest: 0.5 + 0.1 * round_}) for digest in digests]
                requests = [
                    EngineRequest((5, 6, 7 + i), SamplingParams(max_tokens=1 + i, ignore_eos=True), mix)
                    for mix in mixes
                    for i in range(8)
                ]
                answers = await asyncio.gather(*(_all(engine.submit(request)) for request in requests))
                assert all(len(answer) == 1 + i % 8 for i, answer in enumerate(answers))
            over.set()
            await looking
            assert any(view["step_seconds"] is not None for view in views)
            assert {expert["digest"] for view in views for expert in view["experts"]} == set(digests)
            for view in views:
                for lane in view["lanes"]:
                    assert sum(lane["mix"].values()) > 0
                    assert all(one["output_tokens"] + one["prompt_tokens"] > 0 for one in lane["sequences"])

    asyncio.run(body())


async def _all(stream: TokenStream) -> list[TokenEvent]:
    return [event async for event in stream]
