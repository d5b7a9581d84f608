"""A decoded expert: its deltas in packed form on the device, which both modes read; and where it comes from."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Protocol

from server.engine.kernels import LoadedDelta
from server.engine.load_thread import GoOn
from server.engine.parcel import Parcel


@dataclass(frozen=True, eq=False)
class DecodedExpert:
    """All deltas of one expert on the device, by the name of the parameter they move. Identity is the object's: loaded
    again, it lies elsewhere.

    Attributes:
        parcel: the one buffer that the tensors are views of, if they are.
    """

    digest: str
    tensors: Mapping[str, LoadedDelta]
    parcel: Parcel | None = None

    @property
    def nbytes(self) -> int:
        if self.parcel is not None:
            return self.parcel.nbytes
        return sum(tensor.nbytes for tensor in self.tensors.values())


class ExpertSource(Protocol):
    """Where decoded experts come from. The first three and `fetch` are called on a thread of their own, and may block.

    Bytes that `decoded_bytes` had to read may be kept for the `load` that follows.
    """

    def decoded_bytes(self, digest: str) -> int:
        """Bytes that `load` will take on the device at most, known without decoding."""

    def load(self, digest: str) -> DecodedExpert: ...

    def keep(self, digest: str) -> None:
        """What `load` gave has been handed out: now is the time for what nobody waits for. Must not raise."""

    def claim(self, digest: str) -> None:
        """A `load` will follow, whose bytes the device has room for now: what is kept of it need not be kept any more.

        Called on the engine's thread, before `evicted` for those that make the room; must not block.
        """

    def evicted(self, expert: DecodedExpert) -> None:
        """The device gives an expert up that may be asked for again. Called on the engine's thread; must not block."""

    def drop(self, digest: str) -> None:
        """Nobody is to be given this expert any more. Called on the engine's thread; must not block."""

    def fetch(self, digest: str, go_on: GoOn, spared: Collection[str]) -> bool:
        """Bring an expert to host memory; False if there is no room for it there, or no use. Called where `load` is.

        Args:
            go_on: to be asked now and then.
            spared: experts that must not go for it.

        Raises:
            server.engine.fetching.CalledOff: it was not to go on.
            ExpertUnavailableError: as `load`.
        """

    def let_go(self, digest: str) -> None:
        """No load will follow soon: bytes that were read for it need not be kept. Called on the engine's thread; must
        not block."""
