"""The arithmetic of mixed mode in plain torch: what the fast implementations must agree with, and what is used where
none of them can."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from server.engine.kernels.checks import check_fused, check_group
from server.engine.kernels.merging import merge_tensor
from server.engine.kernels.packing import SPARSE_BELOW, dense, pack
from server.engine.kernels.types import (
    Group,
    LoadedTerm,
    PackedDelta,
    rows_and_columns,
)
from store.packed import PackedTernary


class ReferenceKernels:
    """Decodes every delta to a dense matrix, whatever the number of rows. Runs on any device."""

    name = "reference"
    fuse_rows: int | None = None
    lanes = 1
    lists_below = SPARSE_BELOW

    def prepare(self, dtype: torch.dtype, device: torch.device) -> None:
        """There is nothing to do."""

    def add_linear(self, y: torch.Tensor, x: torch.Tensor, groups: Sequence[Group]) -> None:
        for group in groups:
            rows = slice(group.start, group.stop)
            total = y[rows].float()
            for weight, delta in group.terms:
                matrix = dense(delta).view(rows_and_columns(delta.shape))
                total.addmm_(x[rows].float(), matrix.T, alpha=weight)
            y[rows] = total.to(y.dtype)

    def fused_linear(
        self, y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, groups: Sequence[Group]
    ) -> None:
        multiply_merged(self.merge, y, x, weight, bias, groups)

    def merge(self, out: torch.Tensor, pristine: torch.Tensor, terms: Sequence[LoadedTerm]) -> None:
        merge_tensor(out, pristine, terms)

    def transcode(self, name: str, tensor: PackedTernary, device: torch.device) -> PackedDelta:
        return pack(tensor.decode(name), device)


def multiply_merged(
    merge: Callable[[torch.Tensor, torch.Tensor, Sequence[LoadedTerm]], None],
    y: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    groups: Sequence[Group],
) -> None:
    """`Kernels.fused_linear` by `merge` into a copy of the weights, which torch multiplies with."""
    check_fused(y, x, weight, bias)
    for group in groups:
        check_group(group, len(y), (y.shape[1], x.shape[1]))
        shape = group.terms[0][1].shape
        moved = torch.empty_like(weight)
        merge(moved.view(shape), weight.view(shape), group.terms)
        rows = slice(group.start, group.stop)
        y[rows] = torch.nn.functional.linear(x[rows], moved, bias)
