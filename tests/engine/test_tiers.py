"""Store → host memory → device, with real expert files: budgets hold, what is in use stays, damage is noticed."""

from __future__ import annotations

import queue
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from server.engine.bus import Bus
from server.engine.fetching import CalledOff
from server.engine.fresh_files import FreshFiles
from server.engine.host_tier import HostTier
from server.engine.kernels import Overwrites, PackedDelta, backend, dense, pack
from server.engine.load_thread import Errand
from server.engine.loader import ExpertLoader, Transcode
from server.engine.parcel import Parcel, pieces_of
from server.engine.residency import Residency, Ticket
from store.backends.disk import DiskStore
from store.errors import ExpertUnavailableError, SwitchyardError
from store.expert_file import digest_of, read_packed
from store.mix import BASE_MIX, Mix
from store.packed import PackedTernary
from tests.store.builders import base_manifest, write_sample

CPU = torch.device("cpu")


class ApartLoader(ExpertLoader):
    """As on a GPU: the device's memory is another one than the host's, and what is loaded stays in both."""

    def __init__(self, read: Callable[[str], bytes], host: HostTier, transcode: Transcode | None = None) -> None:
        super().__init__(base_manifest(), CPU, read, host, transcode=transcode)
        self._in_place = False


class Shelf:
    """A store with some experts, and loaders over it."""

    def __init__(self, folder: Path, experts: int) -> None:
        self.store = DiskStore(folder)
        self.digests = []
        for seed in range(experts):
            path = write_sample(self.store.quarantine() / "upload", seed)
            digest = digest_of(path)
            self.store.put_blob(path, digest)
            self.digests.append(digest)
        self.read: list[str] = []
        self.size = self.loader(0).load(self.digests[0]).nbytes

    def loader(self, host_bytes: int, *, apart: bool = False) -> ExpertLoader:
        host = HostTier(host_bytes)
        return ApartLoader(self._read, host) if apart else ExpertLoader(base_manifest(), CPU, self._read, host)

    def _read(self, digest: str) -> bytes:
        self.read.append(digest)
        return self.store.read(digest)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shelf]:
    shelf = Shelf(tmp_path_factory.mktemp("shelf"), 6)
    yield shelf
    shelf.store.close()


class Desk:
    """A residency over a loader, with its posted commands run on demand, as the engine's thread would."""

    def __init__(self, loader: ExpertLoader, budget_bytes: int) -> None:
        self.posted: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.residency = Residency(loader, budget_bytes, self.posted.put)
        self.granted: list[Mix] = []

    def ask(self, *digests: str) -> Ticket:
        mix = Mix.of(dict.fromkeys(digests, 1.0))

        def ready(error: SwitchyardError | None) -> None:
            assert error is None
            self.granted.append(mix)

        return self.residency.request(mix, ready)

    def settle(self, until: Callable[[], bool]) -> None:
        while not until():
            self.posted.get(timeout=60)()

    def is_prepared(self) -> bool:
        """Whether there is no more to be done for those who wait."""
        return not self.residency._looks.under_way and self.residency._ahead._job is None


def flip(parcel: Parcel, bit: int) -> None:
    parcel.buffer[bit // 8 % parcel.nbytes] ^= 1 << bit % 8


def kept(loader: ExpertLoader, digest: str) -> Parcel:
    with loader.host.reading(digest) as parcel:
        assert parcel is not None
        return parcel


@pytest.mark.parametrize("apart", [False, True])
def test_what_left_the_device_comes_back_without_being_decoded(shelf: Shelf, apart: bool) -> None:
    loader = shelf.loader(10 * shelf.size, apart=apart)
    expert = loader.load(shelf.digests[0])
    values = {name: dense(delta).clone() for name, delta in expert.tensors.items()}
    loader.evicted(expert)
    shelf.read.clear()
    again = loader.load(shelf.digests[0])
    assert shelf.read == []
    for name, delta in again.tensors.items():
        torch.testing.assert_close(dense(delta), values[name], rtol=0, atol=0)
    if apart:
        assert loader.host.used_bytes == again.nbytes, "the host keeps what the device has a copy of"
    else:
        assert loader.host.used_bytes == 0, "a CPU's own memory is not used twice"
        assert again.parcel is not None
        assert expert.parcel is not None
        assert again.parcel.buffer.data_ptr() == expert.parcel.buffer.data_ptr(), "and nothing was copied"
    loader.drop(shelf.digests[0])
    assert loader.host.used_bytes == 0


@pytest.mark.parametrize("apart", [False, True])
def test_a_bit_flipped_in_host_memory_is_noticed_and_healed(shelf: Shelf, apart: bool) -> None:
    loader = shelf.loader(10 * shelf.size, apart=apart)
    digest = shelf.digests[0]
    loader.evicted(loader.load(digest))
    sound = kept(loader, digest).checksum
    flip(kept(loader, digest), 4242)
    expert = loader.load(digest)
    assert expert.parcel is not None
    assert expert.parcel.is_intact
    assert expert.parcel.checksum == sound
    loader.evicted(expert)
    assert kept(loader, digest).is_intact
    stats = loader.host.stats()
    assert (stats.faults, stats.healed) == (1, 1)


def test_damage_that_nothing_heals_reaches_nobody(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, 1)
    [digest] = shelf.digests
    loader = shelf.loader(10 * shelf.size)
    loader.evicted(loader.load(digest))
    blob = shelf.store.fetch(digest)
    blob.chmod(0o644)
    data = bytearray(blob.read_bytes())
    data[len(data) // 2] ^= 8
    blob.write_bytes(data)
    assert kept(loader, digest).is_intact, "what is in memory is served on"
    loader.evicted(loader.load(digest))
    flip(kept(loader, digest), 99)
    with pytest.raises(ExpertUnavailableError, match="damaged"):
        loader.load(digest)
    assert loader.host.used_bytes == 0
    assert shelf.store.tiers()[0].faults == 1
    shelf.store.close()


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts are larger than a piece, as real ones are."""
    monkeypatch.setattr("server.engine.parcel._CHUNK", 8)
    monkeypatch.setattr("server.engine.parcel._TOGETHER", 3)


@pytest.mark.usefixtures("small_pieces")
def test_an_expert_arrives_in_pieces(shelf: Shelf) -> None:
    sent: list[int] = []

    class Watched(Bus):
        def _sent(self, target: torch.Tensor, source: torch.Tensor) -> torch.cuda.Event | None:
            sent.append(target.nbytes)
            return super()._sent(target, source)

    loader = shelf.loader(10 * shelf.size, apart=True)
    loader.bus = Watched(CPU)
    expert = loader.load(shelf.digests[0])
    assert expert.parcel is not None
    assert set(sent[:-1]) == {3 * 8 * 8}
    assert sum(sent) == expert.nbytes
    assert torch.equal(expert.parcel.buffer, kept(loader, shelf.digests[0]).buffer)
    assert expert.parcel.buffer.data_ptr() != kept(loader, shelf.digests[0]).buffer.data_ptr()


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("piece", [0, 3, -1])
def test_bytes_damaged_on_the_way_to_the_device_are_refused(shelf: Shelf, piece: int) -> None:
    damaged = list(pieces_of(shelf.size))[piece]

    class BadBus(Bus):
        def _sent(self, target: torch.Tensor, source: torch.Tensor) -> torch.cuda.Event | None:
            arrived = super()._sent(target, source)
            if target.storage_offset() == damaged.start:
                target[-1] ^= 4
            return arrived

    loader = shelf.loader(0, apart=True)
    loader.bus = BadBus(CPU)
    with pytest.raises(ExpertUnavailableError, match="on its way"):
        loader.load(shelf.digests[0])


def test_the_engine_goes_on_while_an_expert_is_under_way_and_computes_with_it_only_once_it_has_arrived(
    shelf: Shelf,
) -> None:
    under_way, go = threading.Event(), threading.Event()

    class SlowBus(Bus):
        def carry(self, parcel: Parcel) -> Parcel | None:
            under_way.set()
            assert go.wait(60)
            return super().carry(parcel)

    posted: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
    loader = shelf.loader(shelf.size, apart=True)
    loader.bus = SlowBus(CPU)
    residency = Residency(loader, 10 * shelf.size, posted.put)
    digest = shelf.digests[0]
    granted: list[object] = []
    try:
        residency.request(Mix.of({digest: 1.0}), granted.append)
        posted.get(timeout=60)()  # its size is known, its load begins
        assert under_way.wait(60)
        others: list[object] = []
        residency.request(BASE_MIX, others.append)
        assert others == [None], "nobody else waits"
        assert posted.empty()
        assert not granted
        assert digest not in residency.experts
        go.set()
        posted.get(timeout=60)()
        assert granted == [None]
        parcel = residency.experts[digest].parcel
        assert parcel is not None
        assert parcel.is_intact
    finally:
        go.set()
        residency.close()


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("together", [1, 2])
def test_a_first_load_reads_its_file_once(shelf: Shelf, apart: bool, together: int) -> None:
    """Though its size must be known before there is room for it: also those of a mix."""
    loader = shelf.loader(0, apart=apart)
    desk = Desk(loader, together * shelf.size)
    shelf.read.clear()
    desk.ask(*shelf.digests[:together])
    desk.settle(lambda: len(desk.granted) == 1)
    assert sorted(shelf.read) == sorted(shelf.digests[:together])
    assert not loader._files._files
    desk.residency.close()


def test_what_was_read_for_a_load_goes_with_whoever_waited_for_it(shelf: Shelf) -> None:
    loader = shelf.loader(0)
    desk = Desk(loader, shelf.size)
    first, second = shelf.digests[:2]
    desk.ask(first)
    desk.settle(lambda: len(desk.granted) == 1)
    ticket = desk.ask(second)
    desk.settle(desk.is_prepared)
    assert loader._files.get(second) == shelf.store.read(second)
    desk.residency.cancel(ticket)
    assert not loader._files._files
    desk.residency.close()


@pytest.mark.parametrize("end", ["loaded", "dropped"])
def test_what_has_been_read_is_not_kept_of_an_expert_that_is_loaded_or_dropped(shelf: Shelf, end: str) -> None:
    loader = shelf.loader(0)
    happens: Callable[[str], object] = {"loaded": loader.load, "dropped": loader.drop}[end]
    loader.decoded_bytes(shelf.digests[0])
    happens(shelf.digests[0])
    assert not loader._files._files


def test_files_are_bounded_and_trusted_for_a_while() -> None:
    now = 0.0
    files = FreshFiles(10, clock=lambda: now)
    for name, size in (("a", 4), ("b", 6), ("c", 3)):
        files.keep(name, bytes(size))
    assert [files.get(name) for name in "abc"] == [None, bytes(6), bytes(3)], "the oldest goes first"
    assert files.take("b") == bytes(6)
    assert files.take("b") is None
    files.keep("d", bytes(20))
    assert [files.get(name) for name in "cd"] == [None, bytes(20)], "a single one may be larger"
    now = 6.0
    assert files.get("d") is None, "what has rotted meanwhile would not be noticed"
    files.drop("d")
    assert not files._files


@pytest.mark.parametrize("apart", [False, True])
def test_who_waits_for_room_is_decoded_meanwhile(shelf: Shelf, apart: bool) -> None:
    loader = shelf.loader((3 if apart else 2) * shelf.size, apart=apart)
    desk = Desk(loader, shelf.size)
    used, *waiting = shelf.digests[:3]
    desk.ask(used)
    desk.settle(lambda: len(desk.granted) == 1)
    for digest in waiting:
        desk.ask(digest)
    desk.settle(desk.is_prepared)
    assert len(desk.granted) == 1
    assert loader.host.digests() == {*waiting, *([used] if apart else [])}
    shelf.read.clear()
    for digest in waiting:
        desk.residency.release(desk.granted[-1])
        desk.settle(lambda digest=digest: digest in desk.residency.experts)  # type: ignore[misc]
        parcel, plain = desk.residency.experts[digest].parcel, shelf.loader(0).load(digest).parcel
        assert parcel is not None
        assert plain is not None
        assert torch.equal(parcel.buffer, plain.buffer)
    assert shelf.read == waiting, "by the ones to compare with"
    assert loader.host.used_bytes <= loader.host.limit_bytes
    desk.residency.close()


@pytest.mark.parametrize("apart", [False, True])
def test_nothing_that_is_needed_goes_for_what_is_fetched(shelf: Shelf, apart: bool) -> None:
    loader = shelf.loader(shelf.size, apart=apart)
    first, second = shelf.digests[:2]
    loader.evicted(loader.load(first))
    shelf.read.clear()
    assert not loader.fetch(second, lambda: True, spared={first})
    assert shelf.read == [], "in vain"
    assert loader.host.digests() == {first}
    assert loader.fetch(second, lambda: True, spared={second})
    assert loader.host.digests() == {second}
    assert loader.fetch(second, lambda: True, spared=())
    assert shelf.read == [second]
    loader.host.limit_bytes += shelf.size // 2
    assert not loader.fetch(first, lambda: True, spared={second}), "half of it would fit"
    assert loader.host.digests() == {second}


def test_what_is_fetched_is_given_up_between_two_tensors(shelf: Shelf) -> None:
    loader = shelf.loader(shelf.size)
    answers = iter([True, False])
    with pytest.raises(CalledOff):
        loader.fetch(shelf.digests[0], lambda: next(answers), spared=())
    assert loader.host.used_bytes == 0
    assert not loader.is_decoding


@pytest.mark.parametrize("event", ["dropped", "claimed"])
def test_what_is_fetched_goes_where_it_belongs_by_then(shelf: Shelf, event: str) -> None:
    """Nowhere, or to its load, which found it neither in host memory nor ready."""
    loader, digest = shelf.loader(2 * shelf.size), shelf.digests[0]
    happens = {"dropped": loader.drop, "claimed": loader.claim}[event]
    pending = [happens]

    def meanwhile() -> bool:
        if pending:
            pending.pop()(digest)
        return True

    shelf.read.clear()
    assert loader.fetch(digest, meanwhile, spared=())
    assert loader.host.used_bytes == 0
    loader.load(digest)
    assert len(shelf.read) == (2 if event == "dropped" else 1)
    assert not loader._claimed


def test_a_host_whose_device_decodes_fetches_nothing(shelf: Shelf) -> None:
    host = HostTier(10 * shelf.size)
    loader = ApartLoader(shelf._read, host, lambda name, tensor, device: pack(tensor.decode(name), device))
    shelf.read.clear()
    assert not loader.fetch(shelf.digests[0], lambda: True, spared=())
    assert shelf.read == []
    assert host.used_bytes == 0


def test_a_copy_to_the_host_is_waited_for() -> None:
    """What the host tier keeps must be there, and in memory that is the tier's own to lock."""
    asked: list[tuple[str, bool]] = []

    class Buffer:
        def to(self, device: torch.device, *, non_blocking: bool) -> Buffer:
            asked.append((device.type, not non_blocking))
            return self

    Parcel("d", Buffer(), (0, 0), {}).on_host()  # type: ignore[arg-type]
    assert asked == [("cpu", True)]


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_random_traffic_keeps_every_budget_and_every_byte(shelf: Shelf, seed: int, apart: bool) -> None:
    """Requests, releases, removals and decay in any order."""
    rng = random.Random(seed)
    loader = shelf.loader(int((5.2 if apart else 3.2) * shelf.size), apart=apart)
    posted: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
    residency = Residency(loader, int(3.2 * shelf.size), posted.put)
    sound = {digest: shelf.loader(0).load(digest).parcel for digest in shelf.digests}
    in_use: list[Mix] = []
    open_requests = 0

    def check() -> None:
        assert residency.used_bytes <= residency.budget_bytes
        assert loader.host.used_bytes <= loader.host.limit_bytes
        for mix in in_use:
            for digest, _ in mix.parts:
                parcel, expected = residency.experts[digest].parcel, sound[digest]
                assert parcel is not None
                assert expected is not None
                assert torch.equal(parcel.buffer, expected.buffer), "in use, and exactly as it was decoded"

    def ask() -> None:
        nonlocal open_requests
        mix = Mix.of(dict.fromkeys(rng.sample(shelf.digests, rng.randint(1, 2)), 1.0))
        open_requests += 1

        def ready(error: SwitchyardError | None) -> None:
            nonlocal open_requests
            assert error is None
            open_requests -= 1
            in_use.append(mix)

        residency.request(mix, ready, rng.choice(["one", "two"]))

    def decay() -> None:
        with loader.host._lock:  # what is being read has been checked, or is about to be
            idle = [entry.parcel for entry in loader.host._entries.values() if entry.readers == 0]
            if idle:
                flip(rng.choice(idle), rng.randrange(10_000))

    def settle(most_open: int) -> None:
        """Until so few requests wait, give back what is in use, in any order."""
        while open_requests > most_open:
            while in_use and (len(in_use) > 2 or posted.empty()):
                residency.release(in_use.pop(rng.randrange(len(in_use))))
                check()
            if open_requests > most_open:
                posted.get(timeout=60)()
            check()

    for _ in range(200):
        rng.choice([ask, ask, decay, lambda: residency.drop(rng.choice(shelf.digests))])()
        settle(most_open=rng.randint(1, 4))
    settle(most_open=0)
    while in_use:
        residency.release(in_use.pop())
    residency.close()
    device, host = residency.stats(), loader.host.stats()
    assert device.evictions > 0
    assert host.hits > 0
    assert host.faults == host.healed > 0


def test_a_device_that_decodes_is_given_what_is_stored(shelf: Shelf) -> None:
    """What it makes is kept in host memory, and is what the host would have made."""
    decoded: list[str] = []

    def transcode(name: str, tensor: PackedTernary, device: torch.device) -> PackedDelta:
        decoded.append(name)
        return pack(tensor.decode(name), device)

    loader = ApartLoader(shelf.store.read, HostTier(10 * shelf.size), transcode)
    digest = shelf.digests[1]
    expert, plain = loader.load(digest), shelf.loader(0).load(digest)
    assert loader.host.used_bytes == 0, "whoever waits for it does not wait for a copy in host memory"
    loader.keep(digest)
    stored = dict(read_packed(shelf.store.read(digest), base_manifest()))
    assert decoded == [name for name, tensor in stored.items() if isinstance(tensor, PackedTernary)]
    assert decoded
    assert expert.parcel is not None
    assert plain.parcel is not None
    assert torch.equal(expert.parcel.buffer, plain.parcel.buffer)
    assert torch.equal(kept(loader, digest).buffer, plain.parcel.buffer)
    decoded.clear()
    loader.load(digest)
    assert not decoded, "it came from host memory"


def test_a_cpu_that_decodes_in_native_code_makes_the_same_and_keeps_it_once(shelf: Shelf) -> None:
    kernels = backend("auto", CPU)
    loader = ExpertLoader(
        base_manifest(), CPU, shelf.store.read, HostTier(10 * shelf.size), transcode=kernels.transcode
    )
    digest = shelf.digests[1]
    expert, plain = loader.load(digest), shelf.loader(0).load(digest)
    assert expert.parcel is not None
    assert plain.parcel is not None
    for name, delta in plain.tensors.items():
        ours = expert.tensors[name]
        assert not isinstance(delta, Overwrites)
        assert not isinstance(ours, Overwrites)
        assert torch.equal(dense(ours), dense(delta))
    loader.keep(digest)
    assert loader.host.used_bytes == 0
    loader.evicted(expert)
    assert kept(loader, digest) is expert.parcel


def by_device(shelf: Shelf, host: HostTier) -> ApartLoader:
    """A loader whose device decodes."""
    return ApartLoader(shelf.store.read, host, lambda name, tensor, device: pack(tensor.decode(name), device))


def test_what_a_device_has_decoded_is_kept_in_host_memory_once_it_has_been_handed_out(shelf: Shelf) -> None:
    loader = by_device(shelf, HostTier(10 * shelf.size))
    posted: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
    residency = Residency(loader, 10 * shelf.size, posted.put)
    granted: list[object] = []
    residency.request(Mix.of({shelf.digests[0]: 1.0}), granted.append)
    while not granted:
        assert loader.host.used_bytes == 0
        posted.get(timeout=60)()
    residency._thread.submit(lambda _: None, Errand.KEEP, "", None).future.result(timeout=60)
    assert loader.host.digests() == {shelf.digests[0]}
    residency.close()


@pytest.mark.parametrize("end", ["evicted", "dropped"])
def test_nothing_is_kept_in_host_memory_of_what_has_left_the_device_before(shelf: Shelf, end: str) -> None:
    """Its memory on the device is another's by then; or nobody is to be given it any more."""
    loader = by_device(shelf, HostTier(10 * shelf.size))
    digest = shelf.digests[0]
    expert = loader.load(digest)
    if end == "evicted":
        loader.evicted(expert)
    else:
        loader.drop(digest)
    loader.keep(digest)
    assert not loader._unkept
    assert loader.host.used_bytes == 0


def test_what_is_dropped_while_it_is_copied_to_the_host_is_not_kept(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader, digest = by_device(shelf, HostTier(10 * shelf.size)), shelf.digests[0]
    loader.load(digest)

    def meanwhile(parcel: Parcel) -> Parcel:
        loader.drop(parcel.digest)
        return parcel

    monkeypatch.setattr(Parcel, "on_host", meanwhile)
    loader.keep(digest)
    assert loader.host.used_bytes == 0


def test_a_host_without_memory_for_a_copy_lets_go_of_the_device_s(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    loader, digest = by_device(shelf, HostTier(10 * shelf.size)), shelf.digests[0]
    loader.load(digest)

    def full(parcel: Parcel) -> Parcel:
        raise MemoryError

    monkeypatch.setattr(Parcel, "on_host", full)
    loader.keep(digest)
    assert not loader._unkept
    assert "is not kept in host memory" in caplog.text


def test_without_memory_to_decode_in_the_host_decodes(shelf: Shelf) -> None:
    def transcode(name: str, tensor: PackedTernary, device: torch.device) -> PackedDelta:
        raise torch.OutOfMemoryError("no room")

    loader = ApartLoader(shelf.store.read, HostTier(0), transcode)
    expert, plain = loader.load(shelf.digests[1]), shelf.loader(0).load(shelf.digests[1])
    assert expert.parcel is not None
    assert plain.parcel is not None
    for name, delta in plain.tensors.items():
        ours = expert.tensors[name]
        assert not isinstance(delta, Overwrites)
        assert not isinstance(ours, Overwrites)
        assert torch.equal(dense(ours), dense(delta))


@pytest.mark.gpu
def test_a_gpu_decodes_what_is_stored(shelf: Shelf) -> None:
    device = torch.device("cuda")
    transcode = backend("triton", device).transcode
    loader = ExpertLoader(base_manifest(), device, shelf.store.read, HostTier(10 * shelf.size), transcode=transcode)
    for digest in shelf.digests:
        made, plain = loader.load(digest).parcel, shelf.loader(0).load(digest).parcel
        assert made is not None
        assert plain is not None
        assert made.buffer.is_cuda
        assert torch.equal(made.buffer.cpu(), plain.buffer)


@pytest.mark.gpu
def test_a_gpu_loads_from_page_locked_memory(shelf: Shelf) -> None:
    device = torch.device("cuda")
    host = HostTier(10 * shelf.size, page_locked=True)
    loader = ExpertLoader(base_manifest(), device, shelf.store.read, host)
    digest = shelf.digests[0]
    first = loader.load(digest)
    host.settle()
    assert host.is_locked(digest)
    again = loader.load(digest)
    assert host.stats().hits == 2
    for name, delta in again.tensors.items():
        assert delta.device.type == "cuda"
        torch.testing.assert_close(dense(delta), dense(first.tensors[name]), rtol=0, atol=0)
    flip(kept(loader, digest), 4242)
    assert loader.load(digest).parcel is not None
    assert (host.stats().faults, host.stats().healed) == (1, 1)
    host.close()
    assert host.used_bytes == 0


@pytest.mark.gpu
def test_what_a_gpu_has_decoded_is_kept_in_memory_that_the_tier_has_locked(shelf: Shelf) -> None:
    device = torch.device("cuda")
    host = HostTier(10 * shelf.size, page_locked=True)
    transcode = backend("triton", device).transcode
    loader = ExpertLoader(base_manifest(), device, shelf.store.read, host, transcode=transcode)
    digest = shelf.digests[0]
    first = loader.load(digest).parcel
    loader.keep(digest)
    host.settle()
    assert host._entries[digest].locked
    assert kept(loader, digest).is_intact
    again = loader.load(digest).parcel
    assert first is not None
    assert again is not None
    assert torch.equal(first.buffer, again.buffer)
    assert host.stats().faults == 0
    host.close()
