"""A decoded expert: its deltas in packed form on the device, which both modes read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from server.engine.kernels import PackedDelta


@dataclass(frozen=True)
class DecodedExpert:
    """All deltas of one expert on the device, by the name of the parameter they move."""

    digest: str
    tensors: Mapping[str, PackedDelta]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())
