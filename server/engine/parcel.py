"""A decoded expert in one piece: one buffer that moves between host and device as it is, with a checksum."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from server.engine.kernels import LoadedDelta
from server.engine.large_pages import aligned, zeros

_CHUNK = 1 << 18
"""Words of a chunk, for which the checksum is defined."""
_TOGETHER = 16
"""Chunks that a GPU sums up at once: 32 MiB, so that a large expert takes some hundred launches and not thousands, and
checking takes as much memory besides. A CPU does one at a time, which stays in its cache."""

_CPU = torch.device("cpu")

Checksum = tuple[int, int]


@dataclass(frozen=True)
class _Field:
    """Where one tensor lies in the buffer."""

    name: str
    start: int
    nbytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class _Piece:
    """One packed delta without its tensors."""

    kind: type[LoadedDelta]
    fixed: Mapping[str, Any]
    fields: tuple[_Field, ...]


@dataclass(frozen=True, eq=False)
class Parcel:
    """All packed deltas of one expert in one buffer.

    Attributes:
        digest: the expert's.
        buffer: `[bytes]` uint8 on the CPU or on a GPU.
        checksum: of the buffer as it was when it had just been made.
    """

    digest: str
    buffer: torch.Tensor
    checksum: Checksum
    pieces: Mapping[str, _Piece]

    @property
    def nbytes(self) -> int:
        return self.buffer.nbytes

    @property
    def is_intact(self) -> bool:
        """Whether every byte is what it was."""
        return checksum(self.buffer) == self.checksum

    def on_host(self) -> Parcel:
        """The same in host memory; itself if it is there already."""
        # Waited for. Otherwise torch gives the copy out before it has arrived, in page-locked memory of its own,
        # rounded up and never returned; and what is locked already `pin` cannot lock.
        return dataclasses.replace(self, buffer=self.buffer.to(_CPU, non_blocking=False))

    def tensors(self) -> dict[str, LoadedDelta]:
        """The packed deltas by name: views into the buffer."""
        return {name: self._open(piece) for name, piece in self.pieces.items()}

    def _open(self, piece: _Piece) -> LoadedDelta:
        views: dict[str, Any] = {
            field.name: self.buffer[field.start : field.start + field.nbytes].view(field.dtype).view(field.shape)
            for field in piece.fields
        }
        return piece.kind(**piece.fixed, **views)


def parcel_bytes(fields: Iterable[int]) -> int:
    """Bytes of a parcel whose tensors take so many bytes each."""
    return sum(map(aligned, fields))


def wrap(
    digest: str,
    nbytes: int,
    deltas: Iterable[tuple[str, LoadedDelta]],
    device: torch.device = _CPU,
    *,
    exact: bool = True,
) -> Parcel:
    """Put packed deltas, one after the other, into one buffer on the device.

    Args:
        nbytes: of the buffer, by `parcel_bytes`.
        deltas: names and deltas, wherever they are; each may be forgotten when the next one is asked for.
        exact: whether they must take all of it; else what is left is cut off.

    Raises:
        ValueError: they take more than `nbytes`, or less where that is exact.
    """
    buffer = zeros(nbytes) if device == _CPU else torch.zeros(nbytes, dtype=torch.uint8, device=device)
    pieces: dict[str, _Piece] = {}
    end = 0
    for name, delta in deltas:
        fixed: dict[str, Any] = {}
        fields = []
        for field in dataclasses.fields(delta):
            value = getattr(delta, field.name)
            if not isinstance(value, torch.Tensor):
                fixed[field.name] = value
                continue
            flat = value.contiguous().view(-1).view(torch.uint8)
            if end + aligned(len(flat)) > nbytes:
                raise ValueError(f"the tensors of {digest[:12]} take more than the {nbytes} bytes that were announced")
            buffer[end : end + len(flat)].copy_(flat)
            fields.append(_Field(field.name, end, len(flat), value.dtype, tuple(value.shape)))
            end += aligned(len(flat))
        pieces[name] = _Piece(type(delta), fixed, tuple(fields))
    if exact and end != nbytes:
        raise ValueError(f"the tensors of {digest[:12]} take {end} bytes; {nbytes} were announced")
    buffer = buffer[:end]
    return Parcel(digest, buffer, checksum(buffer), pieces)


def checksum(buffer: torch.Tensor) -> Checksum:
    """Two sums modulo 2⁶⁴ over the buffer's 64-bit words: plain, and weighted by odd numbers that differ from place to
    place within a chunk, and from chunk to chunk.

    No flip of a single bit leaves either unchanged. Integers are added exactly whatever the order, so that host and
    device agree; and both add at the speed of their memory, which a cryptographic hash on the host would not: this is
    against decay, not against malice.

    Args:
        buffer: `[bytes]` uint8, a multiple of 8 of them.
    """
    sums = RunningChecksum(buffer.nbytes, buffer.device)
    for piece in pieces_of(buffer.nbytes):
        sums.add(piece.start, buffer[piece])
    return sums.result()


def pieces_of(nbytes: int) -> Iterator[slice]:
    """A buffer in pieces of whole chunks: what is copied, and summed up, at once."""
    size = 8 * _CHUNK * _TOGETHER
    return (slice(start, min(start + size, nbytes)) for start in range(0, nbytes, size))


class RunningChecksum:
    """The `checksum` of a buffer that is not there yet. Only `result` waits for the device.

    For 1.74 GB on a GPU: some 5 launches for each of 52 pieces. Its memory is read twice, and products are written and
    read: 7 GB, or 3 ms at 2.5 TB/s.
    """

    def __init__(self, nbytes: int, device: torch.device, together: int | None = None) -> None:
        """Args:
        nbytes: of the whole buffer.
        together: chunks that are summed up at once, if not as many as suit the device.
        """
        words = nbytes // 8
        chunks = -(-words // _CHUNK)
        self._together = together or (1 if device.type == "cpu" else _TOGETHER)
        self._odd = torch.arange(max(min(_CHUNK, words), chunks), device=device).mul_(2).add_(1)
        self._products = torch.empty(min(self._together * _CHUNK, words), dtype=torch.int64, device=device)
        self._plain, self._weighted = torch.zeros(2, chunks, dtype=torch.int64, device=device)

    def add(self, start: int, piece: torch.Tensor) -> None:
        """Take in a piece.

        Args:
            start: its first byte's place, that of a chunk.
            piece: `[bytes]` uint8: whole chunks, or the end of the buffer.
        """
        words = piece.view(torch.int64)
        whole = len(words) // _CHUNK * _CHUNK
        chunks = words[:whole].view(-1, _CHUNK)
        parts = [chunks[index : index + self._together] for index in range(0, len(chunks), self._together)]
        parts += [words[whole:][None]] if whole < len(words) else []
        first = start // (8 * _CHUNK)
        for part in parts:
            last = first + len(part)
            products = self._products[: part.numel()].view(part.shape)
            torch.mul(part, self._odd[: part.shape[1]], out=products)
            torch.sum(part, 1, out=self._plain[first:last])
            torch.sum(products, 1, out=self._weighted[first:last])
            first = last

    def result(self) -> Checksum:
        """The checksum, once all of the buffer has been taken in."""
        weighted = self._weighted * self._odd[: len(self._weighted)]
        first, second = torch.stack((self._plain.sum(), weighted.sum())).tolist()
        return first, second
