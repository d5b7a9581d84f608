"""A decoded expert in one piece: one buffer that moves between host and device in one copy, with a checksum."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from server.engine.kernels import LoadedDelta

ALIGNMENT = 64
"""Every tensor starts at a multiple of so many bytes: a cache line, and what vector loads like."""
_CHUNK = 1 << 18
"""Words that are summed up at once: bounds the memory that checking takes."""

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

    def to(self, device: torch.device) -> Parcel:
        """The same on a device, in one copy; itself if it is there already."""
        # To the host it is waited for. Otherwise torch gives the copy out before it has arrived, in page-locked memory
        # of its own, rounded up and never returned; and what is locked already `pin` cannot lock.
        return dataclasses.replace(self, buffer=self.buffer.to(device, non_blocking=device.type != "cpu"))

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
    return sum(map(_aligned, fields))


def wrap(digest: str, nbytes: int, deltas: Iterable[tuple[str, LoadedDelta]], device: torch.device = _CPU) -> Parcel:
    """Put packed deltas, one after the other, into one buffer on the device.

    Args:
        nbytes: of the buffer, by `parcel_bytes`.
        deltas: names and deltas, wherever they are; each may be forgotten when the next one is asked for.

    Raises:
        ValueError: they do not take exactly `nbytes`.
    """
    buffer = torch.zeros(nbytes, dtype=torch.uint8, device=device)
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
            if end + _aligned(len(flat)) > nbytes:
                raise ValueError(f"the tensors of {digest[:12]} take more than the {nbytes} bytes that were announced")
            buffer[end : end + len(flat)].copy_(flat)
            fields.append(_Field(field.name, end, len(flat), value.dtype, tuple(value.shape)))
            end += _aligned(len(flat))
        pieces[name] = _Piece(type(delta), fixed, tuple(fields))
    if end != nbytes:
        raise ValueError(f"the tensors of {digest[:12]} take {end} bytes; {nbytes} were announced")
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
    words = buffer.view(torch.int64)
    odd = torch.arange(min(_CHUNK, len(words)), device=buffer.device).mul_(2).add_(1)
    products = torch.empty_like(odd)
    plain = torch.zeros((), dtype=torch.int64, device=buffer.device)
    weighted = torch.zeros_like(plain)
    for index, start in enumerate(range(0, len(words), _CHUNK)):
        part = words[start : start + _CHUNK]
        plain += part.sum()
        own = torch.mul(part, odd[: len(part)], out=products[: len(part)])
        weighted += own.sum() * (2 * index + 1)
    return int(plain), int(weighted)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
