"""From host memory to the device: nothing is checked before it has arrived, nothing is left under way."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import pytest
import torch

from server.engine.bus import Bus
from server.engine.parcel import Parcel, RunningChecksum, checksum

CPU = torch.device("cpu")
PIECE = 3 * 8 * 8


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.engine.parcel._CHUNK", 8)
    monkeypatch.setattr("server.engine.parcel._TOGETHER", 3)


class Stream:
    """A GPU's, on which copies happen as late as they may: when somebody waits for them."""

    def __init__(self) -> None:
        self.queued: list[tuple[torch.Tensor, torch.Tensor]] = []

    def record_event(self) -> Event:
        return Event(self, len(self.queued))

    def synchronize(self) -> None:
        self.run(len(self.queued))

    def run(self, count: int) -> None:
        for place, (target, source) in enumerate(self.queued[:count]):
            target.copy_(source)
            self.queued[place] = (target[:0], source[:0])


class Event:
    """What has been queued until now."""

    def __init__(self, stream: Stream, count: int) -> None:
        self._stream, self._count = stream, count

    def wait(self) -> None:
        self._stream.run(self._count)


class LateBus(Bus):
    """As on a GPU, with such streams."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(CPU)
        self.copying = Stream()
        self.stream = self.copying  # type: ignore[assignment]

        def on(stream: object) -> AbstractContextManager[object]:
            return nullcontext()

        monkeypatch.setattr("server.engine.bus.on", on)

    def _sent(self, target: torch.Tensor, source: torch.Tensor) -> torch.cuda.Event | None:
        self.copying.queued.append((target.fill_(255), source))
        return super()._sent(target[:0], source[:0])

    @property
    def under_way(self) -> int:
        return sum(target.nbytes for target, _ in self.copying.queued)


def parcel(nbytes: int) -> Parcel:
    buffer = torch.arange(nbytes).to(torch.uint8)
    return Parcel("d", buffer, checksum(buffer), {})


@pytest.mark.parametrize("nbytes", [0, 64, PIECE, PIECE + 64, 5 * PIECE + 128])
def test_what_arrives_late_is_checked_after_it_has_arrived(nbytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    bus, sent = LateBus(monkeypatch), parcel(nbytes)
    came = bus.carry(sent)
    assert came is not None
    assert torch.equal(came.buffer, sent.buffer)
    assert bus.under_way == 0


def test_one_piece_is_checked_while_others_are_on_their_way(monkeypatch: pytest.MonkeyPatch) -> None:
    bus, left = LateBus(monkeypatch), []

    class Watched(RunningChecksum):
        def add(self, start: int, piece: torch.Tensor) -> None:
            left.append(bus.under_way)
            super().add(start, piece)

    monkeypatch.setattr("server.engine.bus.RunningChecksum", Watched)
    assert bus.carry(parcel(3 * PIECE)) is not None
    assert left == [2 * PIECE, PIECE, 0]


def test_a_copy_is_over_before_its_source_may_be_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the device has no memory left to check it with."""
    bus = LateBus(monkeypatch)

    class Large(RunningChecksum):
        def add(self, start: int, piece: torch.Tensor) -> None:
            raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr("server.engine.bus.RunningChecksum", Large)
    with pytest.raises(torch.OutOfMemoryError):
        bus.carry(parcel(3 * PIECE))
    assert bus.under_way == 0


class Slow(Bus):
    """A bus on which a byte takes a millisecond."""

    def __init__(self) -> None:
        self.now = 100.0
        super().__init__(CPU, lambda: self.now)
        self.asked: list[tuple[float, list[float]]] = []

    def _sent(self, target: torch.Tensor, source: torch.Tensor) -> torch.cuda.Event | None:
        self.asked.append((self.now, [round(self.patience(step), 6) for step in (0.1, 0.2, 1.0)]))
        self.now += 0.001 * target.nbytes
        return super()._sent(target, source)


def test_what_is_due_within_half_a_step_is_worth_waiting_for() -> None:
    bus = Slow()
    assert bus.carry(parcel(3 * PIECE)) is not None
    assert [waits for _, waits in bus.asked] == [[0.0] * 3] * 3, "nobody knows how fast it is"
    bus.asked.clear()
    bus.now = 200.0
    assert bus.carry(parcel(3 * PIECE)) is not None
    due = 200 + 1.05 * 0.576
    first, second, third = ([round(due - now, 6)] for now, _ in bus.asked)
    assert [waits for _, waits in bus.asked] == [[0, 0, 0], [0, 0, *second], [0, 0, *third]]
    assert first > [0.5] >= second > third > [0.1], "half of the longest step is half a second"
    bus.asked.clear()
    assert bus.carry(parcel(64)) is not None
    assert [waits for _, waits in bus.asked] == [[0, 0.0672, 0.0672]]
    assert bus.patience(1e9) == 0.0, "nothing is on its way"


def test_nobody_waits_for_what_is_late() -> None:
    bus = Slow()
    assert bus.carry(parcel(3 * PIECE)) is not None
    late: list[float] = []

    class Late(Slow):
        def _sent(self, target: torch.Tensor, source: torch.Tensor) -> torch.cuda.Event | None:
            self.now += 1
            late.append(self.patience(1e9))
            return super()._sent(target, source)

    bus.__class__ = Late
    assert bus.carry(parcel(3 * PIECE)) is not None
    assert late == [0.0] * 3


def test_what_is_not_what_it_was_does_not_arrive(monkeypatch: pytest.MonkeyPatch) -> None:
    bus, sent = LateBus(monkeypatch), parcel(3 * PIECE)
    sent.buffer[PIECE] ^= 1
    assert bus.carry(sent) is None
