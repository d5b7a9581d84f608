"""How the GPU benchmark measures: medians, next to floors from what this very card copies and multiplies.

Single kernels are timed by events on the device. Whatever a caller waits for (steps, switches, loads, searches) is
timed by the wall clock, from one synchronisation to the next.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

Work = Callable[[], object]

PAUSE = 60_000_000
"""Cycles, about 30 ms: the host queues what is to be timed meanwhile, so that its own time is not in the figure."""

QUEUED = 64
"""Most calls of one timing: the host has to be done with queueing them before the pause is over."""


@dataclass(frozen=True)
class Size:
    """The shape of a base, as Llama names things."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    context: int


EIGHT_B = Size(4096, 14336, 32, 32, 8, 128256, 8192)
"""Llama-3.1-8B: 6.98 billion weights in the decoder's matrices, 8.03 in all."""
TINY = Size(64, 96, 2, 4, 2, 160, 512)


@dataclass(frozen=True)
class Effort:
    """How much of everything; a dry run has the same sections with little in each."""

    size: Size
    densities: tuple[float, ...]
    rows: tuple[int, ...]
    prompts: tuple[int, ...]
    """Rows of a prompt."""
    rounds: int
    calls: int
    """Steps of one timing."""
    context: int
    """Tokens before each decoded one."""
    kv_bytes: int
    spread_bytes: int
    """What the input sets of one timing take together: several times what the card's cache holds."""
    registered: int
    """Experts on the device in the test of what their presence costs."""


FULL = Effort(
    EIGHT_B, (0.012, 0.05, 0.1, 0.3), (1, 8, 32, 512), (64, 128, 512, 2048), 9, 4, 256, 3 << 30, 256 << 20, 100
)
DRY = Effort(TINY, (0.012, 0.3), (1, 40), (20,), 1, 1, 20, 2 << 20, 1, 3)


class Lab:
    """A device, how much is done on it, and what it can do at best.

    Attributes:
        copied: bytes per second, read and written, of a device-to-device copy.
        multiplied: floating-point operations per second of a large product in the base's type.
        carried: bytes per second of a copy from page-locked host memory to the device.
        left_out: what there was no time for, since somebody asked last.
    """

    def __init__(self, device: torch.device, effort: Effort, seconds: float, pause: int = PAUSE) -> None:
        """Args:
        seconds: after which no further section begins.
        pause: cycles that the device waits before what is timed.
        """
        self.pause = pause
        self.device = device
        self.effort = effort
        self.dtype = torch.bfloat16
        self._ends = time.monotonic() + seconds
        self.left_out: list[str] = []
        self.on_gpu = device.type == "cuda"
        self.copied, self.multiplied, self.carried = self._copied(), self._multiplied(), self._carried()

    @property
    def seconds_left(self) -> float:
        return self._ends - time.monotonic()

    def late(self, what: str) -> bool:
        """Whether there is no time left for something: it is noted then."""
        if self.seconds_left >= 0:
            return False
        self.left_out.append(what)
        return True

    def floor(self, nbytes: float, operations: float = 0.0) -> float:
        """Seconds that moving so many bytes, or computing so much, takes at least on this card."""
        return max(nbytes / self.copied, operations / self.multiplied)

    def sync(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def free(self) -> None:
        """Give back what nothing refers to any more."""
        if self.on_gpu:
            torch.cuda.empty_cache()

    def device_seconds(self, works: Mapping[str, list[Work]], rounds: int | None = None) -> dict[str, list[float]]:
        """Device time of each work per call, in turns, after one turn that does not count.

        A work is a list of calls on different inputs; all of them are queued behind a pause before the first one runs.
        """
        return self._rounds(works, self._device_timed, rounds)

    def wall_seconds(self, works: Mapping[str, list[Work]], rounds: int | None = None) -> dict[str, list[float]]:
        """Time of each work per call as a caller sees it, in turns, after one turn that does not count."""
        return self._rounds(works, self._wall_timed, rounds)

    def _rounds(
        self, works: Mapping[str, list[Work]], timed: Callable[[list[Work]], float], rounds: int | None
    ) -> dict[str, list[float]]:
        taken: dict[str, list[float]] = {name: [] for name in works}
        for turn in range(1 + (self.effort.rounds if rounds is None else rounds)):
            for name, calls in works.items():
                seconds = timed(calls)
                if turn:
                    taken[name].append(seconds)
        return taken

    def _wall_timed(self, calls: list[Work]) -> float:
        self.sync()
        began = time.perf_counter()
        for call in calls:
            call()
        self.sync()
        return (time.perf_counter() - began) / len(calls)

    def _device_timed(self, calls: list[Work]) -> float:
        if not self.on_gpu:
            return self._wall_timed(calls)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        self.sync()
        torch.cuda._sleep(self.pause)  # type: ignore[no-untyped-call]
        begin.record()
        for call in calls:
            call()
        end.record()
        self.sync()
        return float(begin.elapsed_time(end)) / 1e3 / len(calls)

    def _copied(self) -> float:
        count = (1 << 30) if self.on_gpu else 1 << 20
        source = torch.ones(count, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        taken = self.device_seconds({"": [lambda: target.copy_(source)]}, 7)
        return 2 * count / statistics.median(taken[""])

    def _carried(self) -> float:
        count = (1 << 28) if self.on_gpu else 1 << 20
        source = torch.ones(count, dtype=torch.uint8, pin_memory=self.on_gpu)
        target = torch.empty(count, dtype=torch.uint8, device=self.device)
        taken = self.device_seconds({"": [lambda: target.copy_(source, non_blocking=True)]}, 7)
        return count / statistics.median(taken[""])

    def _multiplied(self) -> float:
        side = 8192 if self.on_gpu else 128
        a, b = (torch.randn(side, side, device=self.device).to(self.dtype) for _ in range(2))
        out = torch.empty_like(a)
        taken = self.device_seconds({"": [lambda: torch.mm(a, b, out=out)] * 3}, 7)
        return 2 * side**3 / statistics.median(taken[""])


def median_ms(seconds: list[float]) -> float:
    return 1e3 * statistics.median(seconds)


def cycled(items: list[Work], count: int) -> list[Work]:
    """So many calls, taking the items in turns."""
    turns: Iterator[Work] = itertools.cycle(items)
    return list(itertools.islice(turns, count))


def turned(calls: list[Work], least: int) -> list[Work]:
    """So many calls at least, and as many as may be queued at most; each runs the next of the calls given, from timing
    to timing, so that none finds in the card's cache what it has left there.

    What is prepared at the first call of an input set is there when it is timed: those that do not have theirs in the
    turn that does not count have it now.
    """
    count = max(least, min(QUEUED, len(calls)))
    for call in calls[count:]:
        call()
    turns: Iterator[Work] = itertools.cycle(calls)
    return [lambda: next(turns)()] * count
