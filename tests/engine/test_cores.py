"""Steps leave a core to the thread that decodes an expert, if there is none besides."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from server.engine.cores import Cores
from server.engine.engine import TransformersEngine
from server.engine.executor import Executor
from store.mix import BASE_MIX, Mix
from tests.engine.conftest import SETTINGS, Library, collect, until


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def _machine(monkeypatch: pytest.MonkeyPatch, cores: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _process: set(range(cores)))


@pytest.mark.parametrize(
    ("threads", "cores", "beside_a_load"), [(2, 2, 1), (1, 1, 1), (2, 1, 1), (4, 4, 3), (4, 3, 3), (3, 4, 3)]
)
def test_a_step_has_a_thread_less_while_a_load_would_take_its_core(
    threads: int, cores: int, beside_a_load: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    _machine(monkeypatch, cores)
    shared = Cores(threads)
    assert torch.get_num_threads() == threads
    for _ in range(2):
        shared.share(True)
        assert torch.get_num_threads() == beside_a_load
        shared.share(False)
        assert torch.get_num_threads() == threads


def test_without_a_setting_it_is_what_torch_has_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    _machine(monkeypatch, 5)
    torch.set_num_threads(5)
    Cores(None).share(True)
    assert torch.get_num_threads() == 4


def test_streams_leave_a_core_to_a_load_and_take_it_back(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    _machine(monkeypatch, 2)
    digest = library.add(60)
    asked, go, run = threading.Event(), threading.Event(), Executor.run
    seen: list[int] = []

    def watched(self: Executor, *arguments: Any) -> Any:
        seen.append(torch.get_num_threads())
        return run(self, *arguments)

    def slow(wanted: str) -> bytes:
        asked.set()
        assert go.wait(60)
        return library.read(wanted)

    monkeypatch.setattr(Executor, "run", watched)
    engine = TransformersEngine(
        library.base, name="tiny", settings=replace(SETTINGS, threads=2), read_expert=slow, cache_dir=None
    )

    async def body() -> None:
        await engine.start()
        try:
            await collect(engine, [1, 2, 3], BASE_MIX)
            assert set(seen) == {2}
            cold = asyncio.create_task(collect(engine, [1, 2, 3], Mix.of({digest: 1.0})))
            await asyncio.to_thread(asked.wait, 60)
            go.set()
            await cold
            await until(lambda: not engine.stats().waiting)
            seen.clear()
            await collect(engine, [1, 2, 3], BASE_MIX)
            assert set(seen) == {2}
            # Dropped and asked for again: its size is known, and all that is waited for is the load.
            await engine.drop_expert(digest)
            asked.clear()
            go.clear()
            seen.clear()
            again = asyncio.create_task(collect(engine, [1, 2, 3], Mix.of({digest: 1.0})))
            await asyncio.to_thread(asked.wait, 60)
            await collect(engine, [1, 2, 3], BASE_MIX)
            assert set(seen) == {1}
            go.set()
            await again
        finally:
            go.set()
            await engine.stop()

    asyncio.run(body())
