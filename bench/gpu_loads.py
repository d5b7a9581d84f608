"""A cold expert in page-locked host memory, until the first token of a request for it, while other streams run.

As the engine does it, the load runs beside the others' steps. Next to it what a load that is waited for would cost: the
others stand still, and the request begins without waiting for the end of one of their steps.
"""

from __future__ import annotations

import dataclasses
import queue
import statistics
import time
from collections.abc import Callable

from bench.gpu_bench import Bench
from bench.gpu_world import parcel
from bench.report import Bar, Row, bar
from server.engine.host_tier import HostTier
from server.engine.loader import ExpertLoader
from server.engine.residency import Residency
from server.engine.scheduler import Batch
from store.errors import ExpertUnavailableError, SwitchyardError
from store.mix import BASE_MIX, Mix

_STREAMS = 8


class _House:
    """Loader, host tier and residency as the engine has them; what they post is run between steps."""

    def __init__(self, bench: Bench, density: float) -> None:
        template = parcel(bench.model, density)
        self.nbytes = template.nbytes
        self.host = HostTier(3 * template.nbytes, page_locked=bench.lab.on_gpu)
        loader = ExpertLoader(bench.model.manifest, bench.lab.device, self._read, self.host)
        self.commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.residency = Residency(loader, template.nbytes, post=self.commands.put)
        self.digests = ("cold one", "cold other")
        for digest in self.digests:
            own = dataclasses.replace(template, digest=digest, buffer=template.buffer.clone())
            self.host.put(own, 0.0)

    def _read(self, digest: str) -> bytes:
        raise ExpertUnavailableError(f"{digest} is in host memory only")

    def close(self) -> None:
        self.residency.close()
        self.host.close()


def cold(bench: Bench) -> tuple[list[Row], list[Bar]]:
    """Two experts take each other's place on the device; each is asked for cold, then warm."""
    rows: list[Row] = []
    bars: list[Bar] = []
    for density in bench.lab.effort.densities:
        house = _House(bench, density)
        streams = bench.batch([BASE_MIX] * _STREAMS)
        bench.executor.run(streams, {})
        alone = [_timed(bench.step(streams, {})) for _ in range(10)]
        added, during, blocked, still = [], [], [], []
        mix, other = (Mix.of({digest: 1.0}) for digest in house.digests)
        try:
            for number in range(2 + bench.lab.effort.rounds):
                first, steps = _first_token(bench, house, streams, mix)
                warm, _ = _first_token(bench, house, streams, mix)
                waiting, stopped = _first_token(bench, house, streams, other, overlapped=False)
                if number >= 2:
                    added.append(first - warm)
                    during += steps
                    blocked.append(waiting - warm)
                    still += stopped
        finally:
            bench.end(streams)
            house.close()
        ms = 1e3 * statistics.median(added)
        rows.append({"what": "cold expert", "density": density, "MB": house.nbytes / 1e6, "added ms": ms,
                     "GB/s": house.nbytes / 1e9 / max(1e-9, statistics.median(added)),
                     "step alone ms": 1e3 * statistics.median(alone),
                     "step meanwhile ms": 1e3 * statistics.median(during) if during else None,
                     "added ms, waited for": 1e3 * statistics.median(blocked),
                     "others' pause ms, waited for": 1e3 * statistics.median(still)})  # fmt: skip
        if density == 0.012 or 0.1 <= density < 0.2:
            what = f"cold expert at density {density} in page-locked memory: what its first token waits longer, ms"
            bars.append(bar(f"gpu.cold.{density}", what, ms, "<=", 40))
    return rows, bars


def _first_token(
    bench: Bench, house: _House, streams: Batch, mix: Mix, *, overlapped: bool = True
) -> tuple[float, list[float]]:
    """Seconds from the request until its first token, and those of the other streams' steps until it could begin; if
    the load is not overlapped but waited for, those that the other streams stood still."""
    outcome: list[SwitchyardError | None] = []
    began = time.perf_counter()
    house.residency.request(mix, outcome.append)
    steps = []
    while True:
        while not house.commands.empty():
            house.commands.get()()
        if outcome:
            break
        steps.append(_timed(bench.step(streams, {}) if overlapped else lambda: house.commands.get()()))
    if outcome[0] is not None:
        raise outcome[0]
    batch = bench.batch([mix])
    bench.executor.run(Batch(streams.work + batch.work, mixed=True), house.residency.experts)
    taken = time.perf_counter() - began
    bench.end(batch)
    house.residency.release(mix)
    return taken, steps if overlapped else [sum(steps)]


def _timed(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began
