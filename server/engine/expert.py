"""A decoded expert: its deltas in packed form on the device, which both modes read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from server.engine.kernels import LoadedDelta
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
