"""The arithmetic of mixed mode in plain torch: what the fast implementations must agree with, and what is used where
none of them can."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from server.engine.kernels.merging import merge_tensor
from server.engine.kernels.packing import dense
from server.engine.kernels.types import Group, LoadedTerm, rows_and_columns


class ReferenceKernels:
    """Decodes every delta to a dense matrix, whatever the number of rows. Runs on any device."""

    name = "reference"

    def add_linear(self, y: torch.Tensor, x: torch.Tensor, groups: Sequence[Group]) -> None:
        for group in groups:
            rows = slice(group.start, group.stop)
            total = y[rows].float()
            for weight, delta in group.terms:
                matrix = dense(delta).view(rows_and_columns(delta.shape))
                total.addmm_(x[rows].float(), matrix.T, alpha=weight)
            y[rows] = total.to(y.dtype)

    def merge(self, out: torch.Tensor, pristine: torch.Tensor, terms: Sequence[LoadedTerm]) -> None:
        merge_tensor(out, pristine, terms)
