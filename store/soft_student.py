"""The model that learns by the FlexSwitch paper's recipe: every entry of every matrix passes, more or less.

A soft mask and a mixture of quantisers are functions of τ alone, with a few numbers per tensor: so they are evaluated
at the middle of each of the 4,096 cells that a tensor's range is divided into (`store.bas`), not at each entry. A pass
over the entries looks values up, another adds up the gradients of a cell; and what is learned gets its gradients from
tables `[T, CELLS]`, by autograd. An entry takes 2 bytes for its cell and 2 or 4 for the base's weight.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Any

import numpy as np
import torch

from store.bas import CELLS, cells_of, centres, extent, stored_levels
from store.checkpoint import Checkpoint
from store.codecs.flex_recipe import Quantiser
from store.codecs.flex_switch import bits_of, multiples
from store.lgs import Ranges, ranges_of
from store.packed import PackedTensor, PackedTernary
from store.student import Beginner
from store.task_vector import deltas_between, load_float32

_CHUNK = 1 << 18
"""Entries at a time, which stay in a processor's cache."""


class SoftStudent(Beginner):
    """The entries of the `T` matrices by cell, and what the model's gradients say of each cell.

    Args:
        model, base, tuned, left_out: see `Beginner`.
        quantiser: what the ranges are.

    Attributes:
        numels: `[T]` elements of each matrix.
        centres: `[T, CELLS]` float32, the τ that a cell stands for.
        counts: `[T, CELLS]` float32, its entries.
        ranges: of magnitudes.
        levels, units: see `store.bas.stored_levels`.
        slopes: `[T, CELLS]` float32, ∂loss/∂value summed over a cell's entries, after a backward pass.

    Raises:
        CheckpointError: see `Beginner`.
    """

    def __init__(
        self, model: Any, base: Checkpoint, tuned: Checkpoint, left_out: Collection[str], quantiser: Quantiser
    ) -> None:
        super().__init__(model, base, tuned, left_out)
        self._quantiser = quantiser
        self._cells: dict[str, torch.Tensor] = {}
        self._pristine: dict[str, torch.Tensor] = {}
        if self._gated:
            self._divide()

    def _divide(self) -> None:
        device = next(iter(self._state.values())).device
        deltas = ((name, tau.view(-1)) for name, tau in deltas_between(self._base, self._tuned) if name in self._gated)
        found: list[tuple[list[float], list[float]]] = []
        counts: list[torch.Tensor] = []
        for name, tau in deltas:
            found.append(ranges_of(tau))
            low, span = extent(self._quantiser, torch.tensor([found[-1][1]]))
            cells = cells_of(tau, float(low), float(span)).to(device)
            self._cells[name] = cells
            counts.append(torch.bincount(cells, minlength=CELLS + 1)[:CELLS].float())
            weights = load_float32(self._base.tensors[name]).view(-1)
            halved = weights.bfloat16()
            self._pristine[name] = (halved if torch.equal(halved.float(), weights) else weights).to(device)
        self.numels = np.array([len(cells) for cells in self._cells.values()])
        lows, highs = (torch.tensor(rows, device=device) for rows in zip(*found, strict=True))
        self.ranges = Ranges(lows, highs)
        self.counts = torch.stack(counts)
        edges = extent(self._quantiser, highs)
        self.centres = centres(*edges)
        self.levels, self.units = stored_levels(*edges)
        self.slopes = torch.zeros_like(self.centres)
        self._hear({name: partial(self._add_up, cells, row) for row, (name, cells) in enumerate(self._cells.items())})

    def _add_up(self, cells: torch.Tensor, row: int, gradient: torch.Tensor) -> None:
        total = torch.zeros(CELLS + 1, device=cells.device)
        for part, some in zip(torch.split(cells, _CHUNK), torch.split(gradient.reshape(-1), _CHUNK), strict=True):
            total += torch.bincount(part, some.float(), CELLS + 1)
        self.slopes[row] = total[:CELLS]

    @torch.no_grad()
    def write(self, values: torch.Tensor) -> None:
        """`parameter ← base + the value of each entry's cell`.

        Args:
            values: `[T, CELLS]` float32.
        """
        tables = torch.cat([values, values.new_zeros(len(values), 1)], 1)
        for table, (name, cells) in zip(tables, self._cells.items(), strict=True):
            parameter = torch.split(self._state[name].view(-1), _CHUNK)
            parts = zip(parameter, torch.split(cells, _CHUNK), torch.split(self._pristine[name], _CHUNK), strict=True)
            for target, part, pristine in parts:
                target.copy_(table.index_select(0, part.int()).add_(pristine))

    def expected_bits(self, mask: torch.Tensor, levels: torch.Tensor) -> float:
        """What the cells of a mask take once encoded: positions as `bits_of` has them, and the entropy of their levels.

        Args:
            mask: `[T, CELLS]` bool.
            levels: `[T, CELLS]` int16, at the width of each tensor; 0 is not stored.
        """
        kept = self.counts.double() * (mask & (levels != 0))
        known = torch.zeros(len(kept), 256, dtype=torch.float64, device=kept.device)
        known.scatter_add_(1, levels.long() + 128, kept)
        total = kept.sum(1)
        likely = known / total.clamp(min=1.0)[:, None]
        entropy = -torch.special.xlogy(likely, likely).sum(1) / np.log(2.0)
        positions = bits_of((total / torch.from_numpy(self.numels).to(total.device)).cpu().numpy(), self.numels)
        return float(positions.sum()) + float(((entropy - 1.0) * total).sum())  # `bits_of` counts a sign each

    def pack(self, mask: torch.Tensor, levels: torch.Tensor, units: torch.Tensor) -> dict[str, PackedTensor]:
        """The entries in the cells of a mask, as they are stored.

        Args:
            mask, levels: as for `expected_bits`.
            units: `[T]`, what a level of 1 is worth.

        Raises:
            CheckpointError: a unit leaves float32.
        """
        kept = torch.where(mask, levels, 0).to(torch.int8)
        tables = torch.cat([kept, kept.new_zeros(len(kept), 1)], 1)
        packed: dict[str, PackedTensor] = {}
        for row, (name, cells) in enumerate(self._cells.items()):
            found = [tables[row].index_select(0, part.int()) for part in torch.split(cells, _CHUNK)]
            whole = torch.cat(found).cpu().numpy()
            indices = np.flatnonzero(whole)
            item: PackedTernary | None = multiples(
                name, tuple(self._state[name].shape), indices, whole[indices], float(units[row])
            )
            if item is not None:
                packed[name] = item
        return packed
