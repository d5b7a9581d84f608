"""What modules compute in a step with experts, in place of their own `forward`: every row with its own mix."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Items
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from server.engine.kernels import Group, gather_rows
from server.engine.layout import Span
from server.engine.sites import Site, per_row, swapped

Forward = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Vectors:
    """The values of one module's vectors for the spans of a step: `choices[name][which[row]]`."""

    choices: Mapping[str, torch.Tensor]
    which: torch.Tensor


@contextmanager
def running(plan: Items[tuple[nn.Module, Forward]]) -> Iterator[None]:
    """Within, these modules have another `forward`."""
    try:
        for module, forward in plan:
            module.forward = forward
        yield
    finally:
        for module, _ in plan:
            module.__dict__.pop("forward", None)


def linear(plain: Forward, add: Callable[[torch.Tensor, torch.Tensor], None], shift: Vectors | None) -> Forward:
    """A product, with what moves its bias and what `add(y, x)` adds to its rows."""

    def forward(x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = plain(x)
        rows = y.view(-1, y.shape[-1])
        if shift is not None:
            rows += shift.choices["bias"].index_select(0, shift.which)
        add(rows, x.reshape(-1, x.shape[-1]))
        return y

    return forward


def moved_rows(module: nn.Module, groups: Items[Group], tokens: torch.Tensor) -> torch.Tensor:
    """`[tokens, size]`: each token's row of an embedding, as its row of the step has it."""
    table = module.get_parameter("weight").data.index_select(0, tokens)
    for group in groups:
        rows = slice(group.start, group.stop)
        moved = table[rows].float()
        for weight, delta in group.terms:
            moved += weight * gather_rows(delta, tokens[rows])
        table[rows] = moved.to(table.dtype)
    return table


def looked_up(site: Site, table_of: Forward) -> Forward:
    """Looks up in a table of the step's own rows, moved: whatever the module does to what it finds still holds."""
    module = site.module
    assert isinstance(module, nn.Embedding)
    plain, parameter = module.forward, module.get_parameter("weight")

    def forward(ids: torch.Tensor) -> torch.Tensor:
        table = table_of(ids.view(-1))
        # Only gradients need it, and it may exceed the table.
        padding, module.padding_idx = module.padding_idx, None
        try:
            with swapped({"weight": parameter}, {"weight": table}):
                found: torch.Tensor = plain(torch.arange(len(table), device=ids.device).view_as(ids))
            return found
        finally:
            module.padding_idx = padding

    return forward


def rowwise(site: Site, vectors: Vectors) -> Forward:
    """A norm whose vectors have an axis for the rows."""
    plain, axis = site.module.forward, site.axis
    parameters = {name: site.module.get_parameter(name) for name in site.names}

    def forward(x: torch.Tensor) -> torch.Tensor:
        values = {name: per_row(choice, vectors.which, axis, x.ndim) for name, choice in vectors.choices.items()}
        with swapped(parameters, values):
            result: torch.Tensor = plain(x)
        return result

    return forward


def spanwise(site: Site, spans: Items[Span], vectors: Vectors) -> Forward:
    plain, axis = site.module.forward, site.axis
    parameters = {name: site.module.get_parameter(name) for name in site.names}

    def forward(x: torch.Tensor) -> torch.Tensor:
        parts = []
        for place, span in enumerate(spans):
            with swapped(parameters, {name: choice[place] for name, choice in vectors.choices.items()}):
                parts.append(plain(x.narrow(axis, span.start, span.stop - span.start)))
        return torch.cat(parts, dim=axis)

    return forward
