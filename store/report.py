"""What compressing an expert cost and kept, in numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from store.codecs.base import CodecName
from store.codecs.t_switch import Knob
from store.deltas import DenseDelta, OverwriteDelta
from store.measured import Measured
from store.packed import PackedOverwrite, PackedTensor, PackedTernary
from store.probe import Probe

if TYPE_CHECKING:
    import torch

    from store.calibrate import Calibration
    from store.learning import Learned


@dataclass(frozen=True)
class KindRow:
    """One line of a report: all tensors stored one way; `kind` is an entry's kind in the file, or "unchanged"."""

    kind: str
    tensors: int
    parameters: int
    nonzeros: int
    bytes: int


@dataclass(frozen=True)
class Report:
    """What compressing cost and kept.

    Attributes:
        bytes: size of the expert file.
        bits_per_param: bits of the file per parameter of the whole base.
        times_smaller: the base's parameters in bfloat16 / `bytes`.
        density: nonzeros / elements over the sparse tensors.
        relative_error: ‖τ − τ̃‖ / ‖τ‖ over all parameters; 0 for an unchanged model.
        changed: parameters that differ from the base / all.
        probe: what of it differs bit by bit, and what keeping all of that would cost; None where the weights are no
            16-bit ones, or an adapter's.
        codec: the method.
        knob: how scales were chosen, where the codec has them.
        measured: how close the expert comes to its fine-tune, as its file has it.
        unmeasured: why it was not compared with its fine-tune although exemplars were given; else None.
        calibration: the multipliers and what they brought; None unless calibrated.
        learned: what learning reached; None unless learned.
        rows: per kind of storage.
        seconds: wall time.
        widened: tries before this one that ended too far from the fine-tune: what each asked for, and how it ended.
    """

    bytes: int
    bits_per_param: float
    times_smaller: float
    density: float
    relative_error: float
    changed: float
    probe: Probe | None
    codec: CodecName
    knob: Knob | None
    measured: Measured
    unmeasured: str | None
    calibration: Calibration | None
    learned: Learned | None
    rows: tuple[KindRow, ...]
    seconds: float
    widened: tuple[str, ...] = ()


@dataclass(frozen=True)
class Overlap:
    """Sums that give ‖τ − scale · levels‖² for any scale without τ: `tau2 − 2 scale · dot + scale² · levels2`."""

    tau2: float
    dot: float = 0.0
    levels2: float = 0.0
    fixed: float | None = None
    """The squared error itself, for a tensor whose reconstruction no knob changes."""

    def squared_error(self, scale: float) -> float:
        if self.fixed is not None:
            return self.fixed
        return self.tau2 - 2 * scale * self.dot + scale * scale * self.levels2


def overlap_of(name: str, delta: torch.Tensor, packed: PackedTensor | None) -> Overlap:
    """The sums for one tensor and what became of it (None: nothing was stored)."""
    tau = delta.float().view(-1).numpy()
    tau2 = float(np.sum(np.square(tau, dtype=np.float64)))
    if packed is None:
        return Overlap(tau2, fixed=tau2)
    decoded = packed.decode(name)
    if isinstance(decoded, OverwriteDelta):
        return Overlap(tau2, fixed=0.0)
    if isinstance(decoded, DenseDelta):
        error = tau - decoded.values.reshape(-1)
        return Overlap(tau2, fixed=float(np.sum(np.square(error, dtype=np.float64))))
    levels2 = float(np.sum(np.square(decoded.levels, dtype=np.float64)))
    return Overlap(tau2, float(np.sum(tau[decoded.indices] * decoded.levels, dtype=np.float64)), levels2)


def relative_error(overlaps: Mapping[str, Overlap], packed: Mapping[str, PackedTensor]) -> float:
    """‖τ − τ̃‖ / ‖τ‖ over all tensors, with the scales as they are now."""
    total = sum(overlap.tau2 for overlap in overlaps.values())
    error = 0.0
    for name, overlap in overlaps.items():
        item = packed.get(name)
        error += overlap.squared_error(item.scale if isinstance(item, PackedTernary) else 0.0)
    return math.sqrt(max(0.0, error) / total) if total else 0.0


def kind_rows(sizes: Mapping[str, int], packed: Mapping[str, PackedTensor]) -> tuple[KindRow, ...]:
    """One row per kind of storage; `sizes` is name → elements of every parameter of the base."""
    kinds: dict[str, list[PackedTensor]] = {"ternary": [], "dense": []}
    for item in packed.values():
        kinds.setdefault(item.kind, []).append(item)
    rows = [
        KindRow(
            kind,
            len(items),
            sum(item.numel for item in items),
            sum(item.nnz if isinstance(item, PackedTernary | PackedOverwrite) else item.numel for item in items),
            sum(item.nbytes for item in items),
        )
        for kind, items in kinds.items()
    ]
    unchanged = [size for name, size in sizes.items() if name not in packed]
    return (*rows, KindRow("unchanged", len(unchanged), sum(unchanged), 0, 0))
