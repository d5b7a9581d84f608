"""A cold expert in page-locked host memory, until the first token of a request for it, while other streams run.

As the engine does it, the load runs beside the others' steps, and the request begins with the first step after it has
ended, for which a step is held back that would begin just before. Next to it what a load that is waited for would cost:
the others stand still, and the request begins at once.
"""

from __future__ import annotations

import dataclasses
import math
import queue
import statistics
import time
from collections.abc import Callable

from bench.gpu_bench import Bench
from bench.gpu_world import matrices, parcel
from bench.report import Bar, Row, bar
from server.engine.expert import DecodedExpert
from server.engine.host_tier import HostTier
from server.engine.kernels import packed_fields
from server.engine.loader import ExpertLoader
from server.engine.residency import Residency
from server.engine.scheduler import Batch
from store.errors import ExpertUnavailableError, SwitchyardError
from store.mix import BASE_MIX, Mix

_STREAMS = 8
_SECONDS = 4.0
"""After which no further round of a density begins."""
_WARM_UPS = 2
"""Rounds that do not count: sizes are asked for, memory is allocated, graphs are captured."""


class _Loader(ExpertLoader):
    """Keeps what each load takes: the copy and the check, without the wait for the end of a step."""

    seconds: list[float]

    def load(self, digest: str) -> DecodedExpert:
        began = time.perf_counter()
        expert = super().load(digest)
        self.seconds.append(time.perf_counter() - began)
        return expert


class _House:
    """Loader, host tier and residency as the engine has them; what they post is run between steps."""

    def __init__(self, bench: Bench, density: float) -> None:
        self._began = time.perf_counter()
        template = parcel(bench.model, density)
        self.nbytes = template.nbytes
        self.tell(f"density {density}: an expert of {self.nbytes / 1e6:.0f} MB made")
        self.host = HostTier(3 * template.nbytes, page_locked=bench.lab.on_gpu)
        self.loader = _Loader(bench.model.manifest, bench.lab.device, self._read, self.host)
        self.loader.seconds = []
        self.commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.residency = Residency(self.loader, template.nbytes, post=self.commands.put)
        self.digests = ("cold one", "cold other")
        for digest, buffer in zip(self.digests, (template.buffer, template.buffer.clone()), strict=True):
            self.host.put(dataclasses.replace(template, digest=digest, buffer=buffer), 0.0)
        self.tell("copied")
        self.host.settle()
        self.locked = all(map(self.host.is_locked, self.digests))
        self.tell("both in page-locked memory" if self.locked else "both in memory that is not page-locked")

    def tell(self, done: str) -> None:
        """Say so at once, with the seconds since the beginning: who runs out of time sees where it went."""
        print(f"  {time.perf_counter() - self._began:5.1f} s: {done}", flush=True)

    def receive(self, step_seconds: float) -> None:
        """Run what was posted, and wait for a load that is about to end, as the engine's thread does between steps."""
        while True:
            patience = self.loader.bus.patience(step_seconds)
            try:
                command = self.commands.get(block=patience > 0, timeout=patience or None)
            except queue.Empty:
                return
            command()

    def _read(self, digest: str) -> bytes:
        raise ExpertUnavailableError(f"{digest} is in host memory only")

    def close(self) -> None:
        self.residency.close()
        self.host.close()


def cold(bench: Bench) -> tuple[list[Row], list[Bar]]:
    """Two experts take each other's place on the device; each is asked for cold, then warm."""
    rows: list[Row] = []
    bars: list[Bar] = []
    for density in _of_different_sizes(bench):
        house = _House(bench, density)
        streams = bench.batch([BASE_MIX] * _STREAMS)
        bench.executor.run(streams, {})
        alone = [_timed(bench.step(streams, {})) for _ in range(10)]
        added, during, held, blocked, still = [], [], [], [], []
        mix, other = (Mix.of({digest: 1.0}) for digest in house.digests)
        began = time.perf_counter()
        try:
            for number in range(_WARM_UPS + bench.lab.effort.rounds):
                first, steps, held_back = _first_token(bench, house, streams, mix)
                warm, _, _ = _first_token(bench, house, streams, mix)
                waiting, stopped, _ = _first_token(bench, house, streams, other, overlapped=False)
                if number < _WARM_UPS:
                    continue
                added.append(first - warm)
                during += steps
                held.append(held_back)
                blocked.append(waiting - warm)
                still += stopped
                if time.perf_counter() - began > _SECONDS:
                    break
            house.tell(f"{len(added)} rounds in {time.perf_counter() - began:.1f} s")
        finally:
            bench.end(streams)
            house.close()
        house.tell("given back")
        ms = 1e3 * statistics.median(added)
        beside, apart = (house.loader.seconds[2 * _WARM_UPS + first :: 2] for first in range(2))
        rows.append({"what": "cold expert", "density": density, "MB": house.nbytes / 1e6, "page-locked": house.locked,
                     "rounds": len(added), "added ms": ms, "load ms": 1e3 * statistics.median(beside),
                     "load GB/s": house.nbytes / 1e9 / statistics.median(beside),
                     "steps meanwhile": len(during) / len(added), "step alone ms": 1e3 * statistics.median(alone),
                     "step meanwhile ms": 1e3 * statistics.median(during) if during else None,
                     "step held back ms": 1e3 * statistics.median(held),
                     "added ms, waited for": 1e3 * statistics.median(blocked),
                     "load ms, waited for": 1e3 * statistics.median(apart),
                     "others' pause ms, waited for": 1e3 * statistics.median(still)})  # fmt: skip
        if density == 0.012 or 0.1 <= density < 0.2:
            what = f"cold expert at density {density} in page-locked memory: what its first token waits longer, ms"
            bars.append(bar(f"gpu.cold.{density}", what, ms, "<=", 40))
    return rows, bars


def _of_different_sizes(bench: Bench) -> list[float]:
    """The densities, without those whose experts take as many bytes as another one's: planes do at any density."""
    shapes = matrices(bench.model).values()
    sizes: dict[int, float] = {}
    for density in bench.lab.effort.densities:
        nbytes = sum(sum(packed_fields(shape, math.ceil(density * math.prod(shape)))) for shape in shapes)
        sizes.setdefault(nbytes, density)
    return list(sizes.values())


def _first_token(
    bench: Bench, house: _House, streams: Batch, mix: Mix, *, overlapped: bool = True
) -> tuple[float, list[float], float]:
    """Seconds from the request until its first token, those of the other streams' steps until it could begin, and for
    which a step was held back; if the load is not overlapped but waited for, all that the other streams stood still."""
    outcome: list[SwitchyardError | None] = []
    began = time.perf_counter()
    house.residency.request(mix, outcome.append)
    steps: list[float] = []
    held_back = _timed(lambda: house.receive(0.0))
    while not outcome:
        if overlapped:
            steps.append(_timed(bench.step(streams, {})))
            held_back += _timed(lambda: house.receive(steps[-1]))
        else:
            steps.append(_timed(lambda: house.commands.get()()))
    if outcome[0] is not None:
        raise outcome[0]
    batch = bench.batch([mix])
    bench.executor.run(Batch(streams.work + batch.work, mixed=True), house.residency.experts)
    taken = time.perf_counter() - began
    bench.end(batch)
    house.residency.release(mix)
    return taken, steps if overlapped else [sum(steps)], held_back


def _timed(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began
