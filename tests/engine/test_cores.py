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

from server.engine import loader
from server.engine.cores import Cores
from server.engine.engine import TransformersEngine
from server.engine.executor import Executor
from store.mix import BASE_MIX, Mix
from tests.engine.conftest import SETTINGS, Library, collect


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


def test_streams_leave_a_core_to_what_decodes_and_take_it_back(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    _machine(monkeypatch, 2)
    mix = Mix.of({library.add(60): 1.0})
    run, decode = Executor.run, loader.read_packed
    reads, decodes = Gate(), Gate()
    seen: list[int] = []

    def watched(self: Executor, *arguments: Any) -> Any:
        seen.append(torch.get_num_threads())
        return run(self, *arguments)

    def read(wanted: str) -> bytes:
        reads.wait()
        return library.read(wanted)

    def decoded(*arguments: Any) -> Any:
        decodes.wait()
        return decode(*arguments)

    monkeypatch.setattr(Executor, "run", watched)
    monkeypatch.setattr(loader, "read_packed", decoded)
    settings = replace(SETTINGS, threads=2)
    engine = TransformersEngine(library.base, name="tiny", settings=settings, read_expert=read)

    async def threads() -> set[int]:
        seen.clear()
        await collect(engine, [1, 2, 3], BASE_MIX)
        return set(seen)

    async def body() -> None:
        await engine.start()
        try:
            assert await threads() == {2}
            reads.shut()
            decodes.shut()
            cold = asyncio.create_task(collect(engine, [1, 2, 3], mix))
            await asyncio.to_thread(reads.reached.wait, 60)
            assert await threads() == {2}, "a file that is on its way needs no core"
            reads.open.set()
            await asyncio.to_thread(decodes.reached.wait, 60)
            assert await threads() == {1}
            decodes.open.set()
            await cold
            assert await threads() == {2}
        finally:
            reads.open.set()
            decodes.open.set()
            await engine.stop()

    asyncio.run(body())


class Gate:
    """Where a thread waits while it is shut."""

    def __init__(self) -> None:
        self.reached, self.open = threading.Event(), threading.Event()
        self.open.set()

    def shut(self) -> None:
        self.open.clear()

    def wait(self) -> None:
        self.reached.set()
        assert self.open.wait(60)
