"""On which GPU a thread works, and on which stream: nothing is left to the first GPU, nor to whose turn it is."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from server.engine import bus
from server.engine.bus import make_current, on, own_stream
from server.engine.engine import TransformersEngine
from server.engine.executor import Executor
from server.engine.feature_queue import FeatureQueue
from server.engine.graphs import GraphCapture
from server.engine.kernels.cuda_module import CudaModule
from server.engine.options import Mode
from store.mix import BASE_MIX, Mix
from tests.engine.conftest import SETTINGS, Library, collect, running
from tests.tiny import save_base

SECOND = torch.device("cuda:1")


@dataclass(frozen=True)
class Stream:
    """One of those that torch hands out."""

    number: int
    device: torch.device = SECOND

    def wait_stream(self, other: Stream) -> None:
        """They are empty."""


class Gpus:
    """torch's functions for devices and streams, without any: each thread begins on the first GPU's default stream.

    Attributes:
        drawn: how many streams were handed out, four of them in turns.
        captures: pool and stream of each capture.
        fails: what the next captures raise at their end, as torch does: without going back to the stream before.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._own = threading.local()
        self.drawn = 0
        self.captures: list[tuple[int, Stream]] = []
        self.fails: list[Exception] = []
        self._pools = 0
        patch.setattr(bus, "_streams", {})
        for name in ("set_device", "device", "stream", "current_stream", "Stream", "graph", "graph_pool_handle"):
            patch.setattr(torch.cuda, name, getattr(self, name))
        patch.setattr(torch.cuda, "CUDAGraph", lambda: type("Graph", (), {"replay": lambda _: None})())

    @property
    def current(self) -> int:
        """This thread's GPU."""
        return getattr(self._own, "index", 0)

    def set_device(self, device: torch.device) -> None:
        self._own.index = device.index

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        before, self._own.index = self.current, device.index
        try:
            yield
        finally:
            self._own.index = before

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self._own.stream = self.current_stream(), stream
        try:
            yield
        finally:
            self._own.stream = before

    def current_stream(self, device: object = None) -> Stream:
        return getattr(self._own, "stream", Stream(-1))

    def Stream(self, device: torch.device, priority: int = 0) -> Stream:
        self.drawn += 1
        return Stream(4 * priority + self.drawn % 4, device)

    def graph_pool_handle(self) -> int:
        self._pools += 1
        return self._pools

    @contextmanager
    def graph(self, graph: object, *, pool: int, stream: Stream, capture_error_mode: str) -> Iterator[None]:
        before, self._own.stream = self.current_stream(), stream
        self.captures.append((pool, stream))
        yield
        if self.fails:
            raise self.fails.pop()
        self._own.stream = before


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Gpus:
    return Gpus(monkeypatch)


def test_a_stream_belongs_to_one_use_and_is_always_the_same(gpus: Gpus) -> None:
    """Also after others have drawn some, and all threads ask at once."""
    uses = ("captures", "what experts add", "copies")
    first = [own_stream(use, SECOND) for use in uses]
    for _ in range(3):
        gpus.Stream(SECOND)
        assert [own_stream(use, SECOND) for use in uses] == first
    found: list[Stream] = []
    threads = [threading.Thread(target=lambda: found.append(own_stream("a fourth", SECOND))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({*first, *found}) == 4


def test_work_on_a_stream_is_work_on_its_device(gpus: Gpus) -> None:
    stream: Any = Stream(3)
    with on(stream):
        assert (gpus.current, gpus.current_stream()) == (1, stream)
    assert (gpus.current, gpus.current_stream()) == (0, Stream(-1))
    with on(None):
        assert gpus.current == 0
    make_current(torch.device("cpu"))
    assert gpus.current == 0


def test_graphs_of_one_pool_are_captured_on_one_stream(gpus: Gpus) -> None:
    """Which is not the one that what experts add is on, whoever draws streams between two captures."""
    capture, seen = GraphCapture(SECOND), []
    for _ in range(5):
        capture(lambda: seen.append((gpus.current, gpus.current_stream())))
        gpus.Stream(SECOND)
        assert (gpus.current, gpus.current_stream()) == (0, Stream(-1))
    (captured,) = set(gpus.captures)
    assert set(seen) == {(1, captured[1])}
    assert own_stream("what experts add", SECOND) != captured[1]


def test_a_capture_that_fails_leaves_neither_its_stream_nor_its_pool_behind(gpus: Gpus) -> None:
    capture = GraphCapture(SECOND)
    gpus.fails.append(RuntimeError("the capture could not end"))
    with pytest.raises(RuntimeError, match="could not end"):
        capture(lambda: None)
    assert (gpus.current, gpus.current_stream()) == (0, Stream(-1))
    capture(lambda: None)
    (one, stream), (other, again) = gpus.captures
    assert one != other
    assert stream == again


def test_kernels_go_to_the_stream_of_their_own_device(gpus: Gpus, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    class Driver:
        def cuLaunchKernel(self, *given: object) -> list[Any]:
            return [type("Status", (), {"value": 0})]

    def current_stream(device: object = None) -> Any:
        asked.append(device)
        return type("Current", (), {"cuda_stream": 0})

    monkeypatch.setattr(torch.cuda, "current_stream", current_stream)
    module = CudaModule.__new__(CudaModule)
    module._driver, module._index, module._functions = Driver(), 1, {"add": object()}
    module.launch("add", (1, 1, 1), 32, 0, torch.zeros(1), 5)
    assert asked == [1]


class Stop(Exception):
    """Far enough."""


def test_an_engine_is_made_on_its_gpu(gpus: Gpus, monkeypatch: pytest.MonkeyPatch, library: Library) -> None:
    def load(*_: object, **__: object) -> None:
        assert gpus.current == 1
        raise Stop

    monkeypatch.setattr("server.engine.engine.choose_device", torch.device)
    monkeypatch.setattr("server.engine.engine.BaseModel", load)
    settings = replace(SETTINGS, device="cuda:1")
    with pytest.raises(Stop):
        TransformersEngine(library.base, name="tiny", settings=settings, read_expert=library.read)


@pytest.mark.anyio
async def test_the_engines_thread_works_on_its_gpu_from_the_first_step_on(
    gpus: Gpus, monkeypatch: pytest.MonkeyPatch, library: Library
) -> None:
    seen: list[tuple[str, int]] = []

    def noting(method: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*given: Any) -> Any:
            seen.append((threading.current_thread().name, gpus.current))
            return method(*given)

        return noted

    monkeypatch.setattr(Executor, "run", noting(Executor.run))
    monkeypatch.setattr(FeatureQueue, "serve", noting(FeatureQueue.serve))
    engine = TransformersEngine(library.base, name="tiny", settings=SETTINGS, read_expert=library.read)
    engine._worker._device = SECOND
    await engine.start()
    try:
        await collect(engine, [1, 2, 3], BASE_MIX, 2)
    finally:
        await engine.stop()
    assert set(seen) == {("engine", 1)}
    assert gpus.current == 0, "the GPU of others is their own affair"


@pytest.mark.gpu
@pytest.mark.anyio
async def test_an_engine_on_the_second_gpu_has_all_that_one_on_the_first_has(tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    library = Library(save_base(tmp_path / "base"), tmp_path)
    mixes = [BASE_MIX, *(Mix.of({library.add(seed, density=density): 1.0}) for seed, density in ((1, 0.3), (2, 0.02)))]
    settings = replace(SETTINGS, device="cuda:1", dtype="float32", mode=Mode.MIXED)
    async with running(library, settings) as engine:
        kernels: Any = engine._worker.executor.mixed._kernels
        assert (kernels.name, kernels._cuda is not None) == ("triton", True)
        for mix in mixes:
            tokens, _ = await collect(engine, [1, 2, 3], mix)
            assert tokens == library.greedy(mix, [1, 2, 3], 12)
        assert (await engine.inspect())["decode_graphs"]["replays"] > 0
    assert torch.cuda.memory_allocated(0) == 0
