"""Where deltas can act beside the weights: which modules own parameters, and where the rows of a step lie in them.

Nothing is assumed of an architecture. Two short runs of the model show, for every module, which axis of its input and
output counts the step's rows; a module that shows no such axis (an expert of a mixture of experts sees some rows only,
for instance), or whose kind is unknown, is not a site, and mixes that touch it run in merged mode.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from torch import nn

from server.engine.quantised import QuantisedLinear

_RUNS = ((13, 5), (17, 7))
"""(rows, rows whose logits are wanted) of the two runs: four different primes, unlikely to be sizes of the model."""

_PRODUCTS = (nn.Linear.forward, QuantisedLinear.forward)

Shape = tuple[int, ...]
Run = Callable[[int, int], object]


class Kind(StrEnum):
    LINEAR = "linear"
    """`nn.Linear`, called with all leading axes but the rows' of size one."""
    EMBEDDING = "embedding"
    """A lookup of rows of its weight, whatever is done to them after."""
    VECTOR = "vector"
    """Vectors only: a norm. The output has the input's shape."""


@dataclass(frozen=True)
class Site:
    """A module whose parameters' deltas can be applied row by row.

    Attributes:
        names: its parameters' attributes → their names in the checkpoint.
        axis: where the rows lie in input and output.
        head: whether they are the rows whose logits are wanted, and not all rows of the step.
        broadcasts: of `VECTOR`: whether parameters with an axis for the rows compute the same, row by row.
    """

    module: nn.Module
    kind: Kind
    names: Mapping[str, str]
    axis: int
    head: bool
    broadcasts: bool = False


def find_sites(network: nn.Module, parameters: Mapping[str, nn.Parameter], run: Run) -> tuple[list[Site], set[str]]:
    """All sites of a model, and the names of the parameters that no site, or not every site they need, serves.

    Args:
        parameters: checkpoint name → parameter, tied ones once.
        run: `run(rows, wanted)` passes so many tokens through the network and wants the logits of so many.
    """
    names = {id(parameter): name for name, parameter in parameters.items()}
    owners = {
        module: {a: names[id(p)] for a, p in module.named_parameters(recurse=False) if id(p) in names}
        for module in network.modules()
    }
    owners = {module: owned for module, owned in owners.items() if owned}
    first, second = (_observe(owners, run, *sizes) for sizes in _RUNS)
    sites: list[Site] = []
    unserved: set[str] = set()
    for module, owned in owners.items():
        site = _site(module, owned, first[module], second[module])
        if site is None:
            unserved |= set(owned.values())
        else:
            sites.append(site)
    used = {name for owned in owners.values() for name in owned.values()}
    return sites, unserved | (set(parameters) - used)


def _observe(
    owners: Mapping[nn.Module, object], run: Run, rows: int, wanted: int
) -> dict[nn.Module, list[tuple[Shape, Shape] | None]]:
    """Shapes of input and output at every call of every module; None for a call of another form."""
    seen: dict[nn.Module, list[tuple[Shape, Shape] | None]] = {module: [] for module in owners}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> None:
        plain = len(args) == 1 and not kwargs and isinstance(args[0], torch.Tensor)
        shapes = (tuple(args[0].shape), tuple(output.shape)) if plain and isinstance(output, torch.Tensor) else None
        seen[module].append(shapes)

    hooks = [module.register_forward_hook(note, with_kwargs=True) for module in owners]
    try:
        run(rows, wanted)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _site(
    module: nn.Module,
    names: Mapping[str, str],
    first: list[tuple[Shape, Shape] | None],
    second: list[tuple[Shape, Shape] | None],
) -> Site | None:
    if len(first) != 1 or len(second) != 1 or first[0] is None or second[0] is None:
        return None
    (given, made), (given_later, made_later) = first[0], second[0]
    for head, sizes in enumerate(zip(*_RUNS, strict=True)):
        axis = _axis(given, given_later, sizes)
        if axis is None or _axis(made, made_later, sizes) != axis:
            continue
        alone = all(size == 1 for size in given[:axis])
        if type(module).forward in _PRODUCTS and alone and axis == len(given) - 2:
            return Site(module, Kind.LINEAR, names, axis, bool(head))
        if isinstance(module, nn.Embedding) and module.max_norm is None and alone and axis == len(given) - 1:
            return Site(module, Kind.EMBEDDING, names, axis, bool(head))
        vectors = all(parameter.ndim == 1 for parameter in module.parameters())
        if vectors and given == made and axis < len(given) - 1 and not any(module.children()):
            return Site(module, Kind.VECTOR, names, axis, bool(head), _broadcasts(module, names, axis, given))
    return None


def _axis(shape: Shape, later: Shape, sizes: tuple[int, int]) -> int | None:
    """The one axis along which two shapes differ, if it grew as `sizes` did."""
    if len(shape) != len(later):
        return None
    differing = [axis for axis, pair in enumerate(zip(shape, later, strict=True)) if pair[0] != pair[1]]
    return differing[0] if len(differing) == 1 and (shape[differing[0]], later[differing[0]]) == sizes else None


@torch.inference_mode()
def _broadcasts(module: nn.Module, names: Mapping[str, str], axis: int, shape: Shape) -> bool:
    """Whether a norm with one weight per row computes what it does with each weight alone."""
    parameters = {name: module.get_parameter(name) for name in names}
    device, dtype = next((p.device, p.dtype) for p in parameters.values())
    generator = torch.Generator().manual_seed(0)

    def noise(size: Shape) -> torch.Tensor:
        return torch.randn(size, generator=generator).to(device, dtype)

    rows, x = shape[axis], noise(shape)
    one = {name: p.data + noise(tuple(p.shape)) for name, p in parameters.items()}
    two = {name: p.data + noise(tuple(p.shape)) for name, p in parameters.items()}
    cut = rows // 2
    which = torch.tensor([0] * cut + [1] * (rows - cut), device=device)
    both = {name: per_row(torch.stack([one[name], two[name]]), which, axis, x.ndim) for name in parameters}
    try:
        with swapped(parameters, both):
            together = module(x)
    except RuntimeError:
        return False
    with swapped(parameters, one):
        above = module(x.narrow(axis, 0, cut))
    with swapped(parameters, two):
        below = module(x.narrow(axis, cut, rows - cut))
    apart = torch.cat([above, below], dim=axis)
    return together.shape == apart.shape and torch.equal(together, apart)


def per_row(choices: torch.Tensor, which: torch.Tensor, axis: int, ndim: int) -> torch.Tensor:
    """Vectors `[choices, size]` picked for every row, shaped to broadcast against an input of `ndim` axes."""
    gap = [1] * (ndim - axis - 2)
    return choices.index_select(0, which).view(len(which), *gap, choices.shape[1])


@contextmanager
def swapped(parameters: Mapping[str, nn.Parameter], values: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Point parameters at other values; what they pointed at is left alone and comes back."""
    before = {name: parameter.data for name, parameter in parameters.items()}
    try:
        for name, parameter in parameters.items():
            parameter.data = values[name]
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data = before[name]
