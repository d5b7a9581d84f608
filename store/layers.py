"""Where an expert spends its bits: by layer, and by module within it. Read from a file's header; no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from store.expert_file import read_header, tensor_bytes
from store.expert_header import LevelsEntry, OverwriteEntry, SparseEntry, TensorEntry

OUTSIDE = "outside"
"""What belongs to no layer: embedding, last norm, head."""
_LAYER = re.compile(r"(?:^|\.)(\d+)\.")
_HALF_BITS = 16


@dataclass(frozen=True)
class Spent:
    """Sums over some tensors of an expert.

    Attributes:
        parameters: elements of these tensors, those that did not change included.
        nonzeros: elements that are stored.
        bytes: in the data section.
        value_bits: bits of all stored values together at fixed width: neither positions nor entropy coding.
    """

    parameters: int = 0
    nonzeros: int = 0
    bytes: int = 0
    value_bits: int = 0

    def __add__(self, other: Spent) -> Spent:
        return Spent(*(own + more for own, more in zip(vars(self).values(), vars(other).values(), strict=True)))

    @property
    def density(self) -> float:
        """Stored elements / elements."""
        return self.nonzeros / max(1, self.parameters)

    @property
    def bits_per_param(self) -> float:
        """Bits in the file, positions included, / elements."""
        return 8 * self.bytes / max(1, self.parameters)

    @property
    def bit_width(self) -> float:
        """Mean bits of a stored value: 1 for a sign, 16 for what is kept in a 16-bit type."""
        return self.value_bits / max(1, self.nonzeros)


def width_of(entry: TensorEntry) -> int:
    """Bits of one stored value at fixed width: of levels up to `top` on either side, ⌈log2(2 · top)⌉."""
    if isinstance(entry, LevelsEntry):
        return max(1, (2 * entry.params["top"] - 1).bit_length())
    return 1 if isinstance(entry, SparseEntry) and not isinstance(entry, OverwriteEntry) else _HALF_BITS


def spent_by_module(file: Path) -> dict[tuple[str, str], Spent]:
    """(layer, module) → what it takes; the layers in order, `OUTSIDE` last.

    Raises:
        ExpertFileError: the file breaks a rule of the format.
    """
    header, sizes = read_header(file), tensor_bytes(file)
    found: dict[tuple[str, str], Spent] = {}
    for name, entry in header.tensors.items():
        match = _LAYER.search(name)
        layer = match.group(1) if match else OUTSIDE
        module = (name[match.end() :] if match else name).removesuffix(".weight")
        nonzeros = entry.nnz if isinstance(entry, SparseEntry) else entry.numel
        own = Spent(entry.numel, nonzeros, sizes[name], nonzeros * width_of(entry))
        found[layer, module] = found.get((layer, module), Spent()) + own
    return dict(sorted(found.items(), key=lambda item: _order(item[0][0])))


def spent_by_layer(file: Path) -> dict[str, Spent]:
    """Layer → what it takes. Raises as `spent_by_module`."""
    found: dict[str, Spent] = {}
    for (layer, _), spent in spent_by_module(file).items():
        found[layer] = found.get(layer, Spent()) + spent
    return found


def _order(layer: str) -> int:
    return int(layer) if layer != OUTSIDE else 1 << 62
