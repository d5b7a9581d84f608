"""Tables made matrix by matrix and group by group: what those made for all matrices at once must equal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from server.engine.kernels import Group
from server.engine.kernels.gpu_tables import CHUNK_FIELDS, TERM_FIELDS, Launch, make_plan

CPU = torch.device("cpu")


def launches(groups: Sequence[Group], rows: int, shape: tuple[int, int], *, padded: bool) -> tuple[Launch, ...] | None:
    """Of one matrix, by form and tile; None where one kind of launch per group does not do."""
    plan = make_plan(groups, rows, shape, CPU)
    if plan.wide:
        return None
    ordered = sorted(plan.launches, key=lambda launch: (launch.sparse, launch.tile))
    return tuple(with_padding(launch) if padded else launch for launch in ordered)


def with_padding(launch: Launch) -> Launch:
    """Chunks of no rows, and terms that no chunk has, up to powers of two."""
    terms = launch.terms
    chunks, count = power(launch.chunks), power(len(terms) // TERM_FIELDS)
    table = torch.zeros(chunks * CHUNK_FIELDS + count * TERM_FIELDS, dtype=torch.int64)
    table[: launch.chunks * CHUNK_FIELDS] = launch.table[: launch.chunks * CHUNK_FIELDS]
    table[chunks * CHUNK_FIELDS :][: len(terms)] = terms
    return replace(launch, chunks=chunks, table=table)


def power(count: int) -> int:
    size = 1
    while size < count:
        size *= 2
    return size
