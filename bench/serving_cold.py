"""How long does an expert that lies on disk keep its first request waiting, and what does that cost running streams?

Seven streams on seven experts run without end; beside them come requests for an eighth, one after the other, in blocks:
none, with the expert on the device (warm), or dropped from it and from the kernel's cache of files (cold). A load may
take half as long again as reading its bytes from this disk and decoding them take where nothing else runs.
"""

from __future__ import annotations

import asyncio
import itertools
import statistics
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import torch

from bench.report import Bar, Row, bar
from bench.serving_stock import Stock, forget
from bench.serving_turns import request, streams
from examples.fetch import CACHE
from server.engine.base_source import choose_device
from server.engine.engine import TransformersEngine
from server.engine.host_tier import HostTier
from server.engine.kernels import backend
from server.engine.loader import ExpertLoader
from store.mix import Mix

LONG = 256
"""Tokens of a stream before it begins again."""
PAUSE = 0.3
"""Seconds between an answer and the next request."""


class Background:
    """Streams that run as long as they are needed, and when each of their tokens came."""

    def __init__(self, engine: TransformersEngine, mixes: list[Mix]) -> None:
        self._engine, self._mixes = engine, mixes
        self._times: list[list[float]] = []
        """Of every stream that has given a token."""

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(self._stream(mix)) for mix in self._mixes]
        while len(self._times) < len(tasks):
            await asyncio.sleep(0.05)
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def gaps(self, began: float, ended: float) -> list[float]:
        """Seconds from token to token of every stream within a time; not from one stream to the next."""
        within = [[at for at in times if began <= at <= ended] for times in self._times]
        return [after - before for times in within for before, after in itertools.pairwise(times)]

    async def _stream(self, mix: Mix) -> None:
        while True:
            stream = self._engine.submit(request(self._engine, mix, LONG))
            times: list[float] = []
            try:
                async for _ in stream:
                    times.append(time.perf_counter())
                    if len(times) == 1:
                        self._times.append(times)
            finally:
                await stream.aclose()


def disk_rate(paths: list[Path]) -> float:
    """Bytes per second at which files come that the kernel does not have in memory."""
    rates = []
    for path in paths:
        forget(path)
        began = time.perf_counter()
        path.read_bytes()
        rates.append(path.stat().st_size / (time.perf_counter() - began))
    return statistics.median(rates)


def decode_seconds(stored: Stock, engine: TransformersEngine, digest: str, rounds: int) -> float:
    """What the loader takes for a file that is in memory, where nothing else runs."""
    device = choose_device("cpu")
    kernels = backend("auto", device, CACHE.parent)
    kernels.prepare(getattr(torch, engine.base.dtype), device)  # all as the engine does
    transcode = kernels.transcode if kernels.name == "cpu" else None
    loader = ExpertLoader(
        engine.base.manifest,
        device,
        stored.store.read,
        HostTier(0),
        transcode=transcode,
        lists_below=kernels.lists_below,
        lanes=kernels.lanes,
    )
    taken = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        loader.load(digest)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[1:])


async def first_token(engine: TransformersEngine, mix: Mix) -> float:
    """Seconds to the first token of a request."""
    began = time.perf_counter()
    await streams(engine, [mix], 1)
    return time.perf_counter() - began


async def cold_rows(
    engine: TransformersEngine, stored: Stock, density: float, *, rounds: int, arrivals: int
) -> tuple[list[Row], list[Bar]]:
    """The times, and the two bars."""
    digest, *others = stored.digests[density]
    rate = disk_rate([stored.path(other) for other in others])
    path, decoding = stored.path(digest), decode_seconds(stored, engine, digest, rounds)
    nbytes = path.stat().st_size
    mix, *hot = stored.mixes(density)
    waits: dict[str, list[float]] = {"warm": [], "cold": []}
    gaps: dict[str, list[float]] = {"none": [], "warm": [], "cold": []}
    background = Background(engine, hot)
    await first_token(engine, mix)
    async with background.running():
        for _ in range(rounds):
            for kind in gaps:
                began = time.perf_counter()
                for _ in range(arrivals):
                    if kind == "cold":
                        await engine.drop_expert(digest)
                        forget(path)
                    if kind in waits:
                        waits[kind].append(await first_token(engine, mix))
                    await asyncio.sleep(PAUSE)
                gaps[kind] += background.gaps(began, time.perf_counter())
    rows: list[Row] = []
    for kind, found in gaps.items():
        told = waits.get(kind)
        first = {} if told is None else {"first token ms": 1e3 * statistics.median(told), "worst": 1e3 * max(told)}
        p50, p99 = 1e3 * np.quantile(found, (0.5, 0.99))
        apart = {"token to token, p50 ms": float(p50), "p99 ms": float(p99), "tokens": len(found)}
        rows.append({"requests beside 7 streams": kind, **first, **apart})
    floor = nbytes / rate + decoding
    rows.append({"expert MB": nbytes / 1e6, "disk MB/s": rate / 1e6, "decode ms": 1e3 * decoding})
    longer = statistics.median(waits["cold"]) - statistics.median(waits["warm"])
    growth = float(np.quantile(gaps["cold"], 0.99) / np.quantile(gaps["none"], 0.99)) - 1
    return rows, [
        bar("engine.cold.wait", "cold expert: wait beyond a warm one's, × read and decode", longer / floor, "<=", 1.5),
        bar("engine.cold.gaps", "cold experts: p99 of the running streams' gaps grows by", growth, "<=", 0.25),
    ]
