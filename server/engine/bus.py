"""From host memory to the device: in pieces, each checked while the next one is on its way."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from server.engine.parcel import Parcel, RunningChecksum, pieces_of

_LATER = 1.05
"""What is on its way is taken to need so many times what it would at the pace of the last one."""
_FIRST = -1
"""The priority of streams whose few kernels go first: among those of a step, at the same priority, a check takes as
long as steps."""


class Bus:
    """Copies parcels to a device, one at a time, on streams of their own: one copies, one checks, and the engine's
    stream waits for neither.

    Copying in pieces leaves room between them for the small copies that every step needs, which one long copy would
    keep waiting until its end. Checked behind the copy, 1.74 GB would take 3 ms more than the 32 ms of a bus that
    carries 54 GB/s; checked piece by piece, the last piece alone counts: 0.1 ms.

    Attributes:
        stream: the one that copies, on which the memory is allocated; None where the device is a CPU.
    """

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.monotonic) -> None:
        self._device = device
        self._clock = clock
        self._pace: float | None = None
        """Seconds that each byte of the last parcel took."""
        self._due: float | None = None
        """When the parcel under way is expected."""
        is_gpu = device.type == "cuda"
        self.stream = own_stream("copies", device, _FIRST) if is_gpu else None
        self._checking = own_stream("checks of copies", device, _FIRST) if is_gpu else None

    def carry(self, parcel: Parcel) -> Parcel | None:
        """The same on the device, in memory of its own, waited for; None if not every byte is what it was.

        Raises:
            torch.OutOfMemoryError: the device has no room for it.
        """
        pieces = list(pieces_of(parcel.nbytes))
        began = self._clock()
        self._due = None if self._pace is None else began + _LATER * self._pace * parcel.nbytes
        try:
            with on(self.stream):
                buffer = torch.empty(parcel.nbytes, dtype=torch.uint8, device=self._device)
                arrivals = [self._sent(buffer[piece], parcel.buffer[piece]) for piece in pieces]
            with on(self._checking):
                sums = RunningChecksum(parcel.nbytes, self._device)
                for piece, arrived in zip(pieces, arrivals, strict=True):
                    if arrived is not None:
                        arrived.wait()
                    sums.add(piece.start, buffer[piece])
                is_intact = sums.result() == parcel.checksum
        finally:
            if self.stream is not None:
                self.stream.synchronize()  # whatever happened, nothing may be read that its owner is about to free
            self._due = None
        self._pace = (self._clock() - began) / max(1, parcel.nbytes)
        return dataclasses.replace(parcel, buffer=buffer) if is_intact else None

    def patience(self, step_seconds: float) -> float:
        """Seconds to wait for what is on its way, rather than begin a step that takes so many; 0 unless it is due
        within half of that.

        A request whose expert arrives just after a step has begun waits for all of it. So it waits for half of one at
        most, and once in a load the other streams wait for as long. From any thread.
        """
        due = self._due
        left = 0.0 if due is None else due - self._clock()
        return left if 0 < left <= step_seconds / 2 else 0.0

    def _sent(self, target: torch.Tensor, source: torch.Tensor) -> torch.cuda.Event | None:
        """Copy a piece, without waiting; what to wait for."""
        target.copy_(source, non_blocking=True)
        return None if self.stream is None else self.stream.record_event()


@contextmanager
def on(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """Within, this thread's work goes to the stream, if there is one, and to its device."""
    if stream is None:
        yield
        return
    # The device apart from the stream: left by the stream alone, a thread would go back to the first GPU, and take
    # memory of it for a context that nobody uses.
    with torch.cuda.device(stream.device), torch.cuda.stream(stream):
        yield


def make_current(device: torch.device) -> None:
    """Make a GPU this thread's own for good: Triton launches where the thread is, not where its tensors are, and every
    thread begins on the first GPU."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


_streams: dict[tuple[str, torch.device], torch.cuda.Stream] = {}
_drawing = threading.Lock()


def own_stream(use: str, device: torch.device, priority: int = 0) -> torch.cuda.Stream:
    """The stream of one use, the same whenever it is asked for, and that of no other.

    torch hands out the same 32 of a priority in turns: who draws one every time comes to be on another's. What is
    launched on the stream of a capture fails it, and what shares a stream does not overlap.
    """
    with _drawing:
        known = _streams.get((use, device))
        while known is None:
            drawn = torch.cuda.Stream(device, priority)  # type: ignore[no-untyped-call]
            if drawn not in _streams.values():
                known = _streams[use, device] = drawn
        return known
