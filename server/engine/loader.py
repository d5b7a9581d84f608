"""Expert file → host memory → device: how a cold expert becomes a resident one, and where it is kept afterwards."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

import numpy as np
import torch

from server.engine.bus import Bus, on
from server.engine.expert import DecodedExpert
from server.engine.fetching import CalledOff
from server.engine.fresh_files import FreshFiles
from server.engine.host_tier import HostTier
from server.engine.kernels import LoadedDelta, Overwrites, PackedDelta, pack, packed_fields
from server.engine.kernels.byte_lists import IN_BYTES
from server.engine.kernels.packing import SPARSE_BELOW
from server.engine.load_thread import GoOn
from server.engine.parcel import Parcel, parcel_bytes, wrap
from store.checkpoint import Checkpoint
from store.deltas import Delta, OverwriteDelta
from store.errors import ExpertUnavailableError
from store.expert_file import DenseEntry, ExpertHeader, OverwriteEntry, read_header, read_packed
from store.manifest import BaseManifest
from store.overwriting import check_sixteen_bits, new_patterns
from store.packed import PackedOverwrite, PackedTernary
from store.patterns import Half
from store.tiers import Tier

_log = logging.getLogger(__name__)

Transcode = Callable[[str, PackedTernary, torch.device], PackedDelta]
DecodeOverwrite = Callable[[str, PackedOverwrite], OverwriteDelta]

_CPU = torch.device("cpu")
_HALVES = {Half.BF16: torch.bfloat16, Half.F16: torch.float16}


class ExpertLoader:
    """`ExpertSource` over expert files and a tier in host memory.

    The files were validated when they came in and are checked again here: bytes can rot between upload and load. What
    comes from host memory is checked on the device, piece by piece as it arrives, by the checksum made when it was
    decoded. Where the device decodes, only what is stored crosses the bus.

    For a GPU the host tier holds what was loaded last, that on the device included: dropping an expert from the device
    costs nothing, and loading it again is one copy over the bus. For a CPU, whose device memory is host memory, a
    decoded expert is in one of the two tiers, and moving it between them copies nothing.

    Args:
        read: digest → exactly the bytes of that digest; may block, may raise ExpertUnavailableError.
        base: the base's weights as they are on disk; experts that overwrite weights need them.
        transcode: `Kernels.transcode`, where the device decodes, or the host in native code; None decodes in NumPy. A
            GPU's temporary tensors take memory besides the expert's: where there is none, the host decodes.
        lists_below, lanes: of `Kernels`.
        decode_overwrite: `CpuKernels.decode_overwrite`, where the host decodes in native code.

    Attributes:
        is_decoding: whether a core is busy with an expert now.
    """

    def __init__(
        self,
        manifest: BaseManifest,
        device: torch.device,
        read: Callable[[str], bytes],
        host: HostTier,
        base: Checkpoint | None = None,
        transcode: Transcode | None = None,
        lists_below: float = SPARSE_BELOW,
        lanes: int = 1,
        decode_overwrite: DecodeOverwrite | None = None,
    ) -> None:
        self._manifest = manifest
        self._base = base
        self._sixteen_bits: set[Half] = set()
        """Types that all of the base's weights are known to be numbers of."""
        self._device = device
        self._transcode = transcode
        self._lists_below, self._lanes = lists_below, lanes
        self._decode_overwrite = decode_overwrite
        self._read = read
        self.host = host
        self._in_place = device.type == "cpu"
        self._claimed: dict[str, Parcel | None] = {}
        """What the host tier had of experts whose loads are about to run."""
        self.bus = Bus(device)
        self.is_decoding = False
        self._lock = threading.Lock()
        self._unkept: dict[str, tuple[Parcel, float]] = {}
        """What the device has decoded and the host has no copy of yet, and the seconds that it took."""
        self._files = FreshFiles()
        self._fetching: str | None = None
        """What is being fetched, unless it has been dropped meanwhile."""

    def decoded_bytes(self, digest: str) -> int:
        """See `ExpertSource.decoded_bytes`. What host memory holds need not be looked for in the store."""
        kept = self.host.bytes_of(digest)
        if kept is not None:
            return kept
        data = self._read(digest)
        nbytes = self._bytes_of(data)
        self._files.keep(digest, data)
        return nbytes

    def load(self, digest: str) -> DecodedExpert:
        """See `ExpertSource.load`.

        Raises:
            ExpertUnavailableError: the expert's bytes are nowhere, or damaged everywhere.
        """
        damaged = False
        with self._kept(digest) as kept:
            if kept is not None:
                parcel = self._moved(kept)
                if parcel is not None:
                    return DecodedExpert(digest, parcel.tensors(), parcel)
                damaged = True
                self.host.meter.damaged(digest)
                self.host.drop(digest)
        began = time.perf_counter()
        decoded, by_device = self._decode(digest)
        seconds = time.perf_counter() - began
        if not self._in_place and not by_device:
            self.host.put(decoded, seconds)
        parcel = self._moved(decoded)
        if parcel is None:
            raise ExpertUnavailableError(f"expert {digest[:12]} was damaged on its way to the device; try again")
        if by_device and parcel.nbytes <= self.host.limit_bytes:
            with self._lock:
                self._unkept[digest] = (parcel, seconds)
        if damaged:
            self.host.meter.healed(digest, Tier.STORE)
        return DecodedExpert(digest, parcel.tensors(), parcel)

    def keep(self, digest: str) -> None:
        """See `ExpertSource.keep`."""
        parcel, seconds = self._unkept.get(digest, (None, 0.0))
        if parcel is None:
            return
        began = time.perf_counter()
        try:
            with on(self.bus.stream):
                copy = parcel.on_host()
        except Exception:
            _log.exception("expert %s is not kept in host memory", digest[:12])
            self._forget(digest)
            return
        with self._lock:
            if self._unkept.pop(digest, None) is not None:
                self.host.put(copy, seconds + time.perf_counter() - began)

    def fetch(self, digest: str, go_on: GoOn, spared: Collection[str]) -> bool:
        """See `ExpertSource.fetch`. Where a device apart decodes, there is no use in it: the host takes many times as
        long, most of it holding the interpreter's lock, which the steps of others need."""
        if self.host.bytes_of(digest) is not None:
            return True
        room = 0 if self._transcode is not None and not self._in_place else self.host.room(spared)
        if room <= 0:
            return False
        began = time.perf_counter()
        self._fetching = digest
        data = self._files.get(digest) or self._read(digest)
        if self._bytes_of(data) > room:
            return False
        parcel = self._packed(digest, data, self._transcode, go_on)
        self._files.drop(digest)
        with self._lock:
            if self._fetching is None:
                return True  # there is no more to be done for it
            if digest in self._claimed:  # too late: its load comes next
                self._claimed[digest] = parcel
                return True
            return self.host.put(parcel, time.perf_counter() - began, spared)

    def let_go(self, digest: str) -> None:
        """See `ExpertSource.let_go`."""
        self._files.drop(digest)

    def claim(self, digest: str) -> None:
        """See `ExpertSource.claim`. Two experts that change places need no room for a third."""
        if self._in_place:
            with self._lock:  # what is fetched meanwhile comes here or there
                self._claimed[digest] = self.host.take(digest)

    def evicted(self, expert: DecodedExpert) -> None:
        """See `ExpertSource.evicted`."""
        if not self._in_place:
            self._forget(expert.digest)  # whose memory is needed
            self.host.touch(expert.digest)
        elif expert.parcel is not None:
            self.host.put(expert.parcel, 0.0)

    def drop(self, digest: str) -> None:
        """See `ExpertSource.drop`."""
        self._files.drop(digest)
        with self._lock:
            self._unkept.pop(digest, None)
            if self._fetching == digest:
                self._fetching = None
        self.host.drop(digest)

    def _forget(self, digest: str) -> None:
        with self._lock:
            self._unkept.pop(digest, None)

    @contextmanager
    def _kept(self, digest: str) -> Iterator[Parcel | None]:
        """What the host tier has of an expert, held for as long as it is copied."""
        if not self._in_place:
            with self.host.reading(digest) as kept:
                yield kept
        elif digest in self._claimed:
            yield self._claimed.pop(digest)
        else:
            yield self.host.take(digest)

    def _decode(self, digest: str) -> tuple[Parcel, bool]:
        """On the device, if it decodes and has the memory; else on the host. And whether a device apart did."""
        data = self._files.take(digest) or self._read(digest)
        if self._transcode is not None:
            try:
                with on(self.bus.stream):
                    return self._packed(digest, data, self._transcode), not self._in_place
            except torch.OutOfMemoryError:
                _log.warning("expert %s is decoded on the host: the device's memory is too full", digest[:12])
        return self._packed(digest, data, None), False

    def _packed(self, digest: str, data: bytes, transcode: Transcode | None, go_on: GoOn = lambda: True) -> Parcel:
        device = _CPU if transcode is None else self._device

        def packed() -> Iterator[tuple[str, LoadedDelta]]:
            for name, tensor in read_packed(data, self._manifest):
                if not go_on():
                    raise CalledOff(digest)
                if transcode is not None and isinstance(tensor, PackedTernary):
                    yield name, transcode(name, tensor, device)
                    continue
                delta: Delta
                if self._decode_overwrite is not None and isinstance(tensor, PackedOverwrite):
                    delta = self._decode_overwrite(name, tensor)
                else:
                    delta = tensor.decode(name)
                yield (
                    name,
                    self._overwrites(name, delta)
                    if isinstance(delta, OverwriteDelta)
                    else pack(delta, _CPU, lists_below=self._lists_below),
                )

        self.is_decoding = True
        try:
            return wrap(digest, self._bytes_of(data), packed(), device, exact=self._lanes != IN_BYTES)
        finally:
            self.is_decoding = False

    def _bytes_of(self, data: bytes) -> int:
        """What an expert file takes at most once it is decoded."""
        return _decoded_bytes(read_header(data), self._lists_below, self._lanes)

    def _overwrites(self, name: str, delta: OverwriteDelta) -> Overwrites:
        if self._base is None:
            raise ExpertUnavailableError("an expert that overwrites weights needs the base's checkpoint")
        if delta.half not in self._sixteen_bits:
            check_sixteen_bits(self._base, delta.half)
            self._sixteen_bits.add(delta.half)
        new = torch.from_numpy(new_patterns(delta, self._base.tensors[name], name).view(np.int16))
        return Overwrites(delta.shape, torch.from_numpy(delta.indices), new.view(_HALVES[delta.half]))

    def _moved(self, parcel: Parcel) -> Parcel | None:
        """On the device; None if it is not there what it was when it had been decoded."""
        if self._in_place or parcel.buffer.is_cuda:
            with on(self.bus.stream):
                moved = parcel if parcel.is_intact else None
        else:
            moved = self.bus.carry(parcel)
        if moved is not None and self.bus.stream is not None:
            # The allocator must not give the memory to the next copy while the engine's stream still reads it.
            moved.buffer.record_stream(torch.cuda.default_stream(self._device))
        return moved


def _decoded_bytes(header: ExpertHeader, lists_below: float, lanes: int) -> int:
    fields: list[int] = []
    for entry in header.tensors.values():
        if isinstance(entry, OverwriteEntry):
            fields += ((4 if entry.numel < 2**31 else 8) * entry.nnz, 2 * entry.nnz)
        elif isinstance(entry, DenseEntry):
            fields += packed_fields(entry.shape, None)
        else:
            fields += packed_fields(entry.shape, entry.nnz, entry.params.get("top", 1), lists_below, lanes)
    return parcel_bytes(fields)
