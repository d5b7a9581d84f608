"""Before anything is timed: does every kernel compute, on this device, what plain PyTorch does on the CPU?

Inputs are drawn anew for every case; what must not be touched holds NaN, and so does what must be overwritten.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from bench.gpu_lab import Lab
from bench.gpu_world import mapped, stored
from bench.report import Row
from server.engine.kernels import Group, Kernels, LoadedDelta, PackedDelta, backend, pack
from server.engine.kernels.merging import merge_tensor_reference
from store.deltas import DenseDelta, SparseDelta

TOLERANCE = 1e-2
"""Relative error of bfloat16 results, as norms."""

_CPU = torch.device("cpu")
_SHAPES = ((160, 96), (33, 70), (256, 224))
_DENSITIES = ((0.012, 1), (0.05, 1), (0.3, 1), (0.2, 7), (1.0, 1))
"""(density, largest level): two of them lists of nonzeros, the others planes."""
_STORED = (0.012, 0.3, 0.5, 0.9)
"""Densities of what is stored: each encoding, and each form that comes out."""
_SPANS = (((0, 1),), ((0, 1), (1, 2), (3, 4)), ((2, 21), (21, 22)), ((0, 70),))
"""Rows of each group: some rows are in none."""


@dataclass(frozen=True)
class Case:
    """Deltas for groups of rows of one product."""

    shape: tuple[int, int]
    spans: tuple[tuple[int, int], ...]
    deltas: tuple[PackedDelta, ...]


def on_device(delta: PackedDelta, device: torch.device) -> PackedDelta:
    return mapped(delta, lambda tensor: tensor.to(device))


def cases(rng: np.random.Generator) -> Iterator[Case]:
    for shape, spans, (density, top) in itertools.product(_SHAPES, _SPANS, _DENSITIES):
        yield Case(shape, spans, (_sparse(rng, shape, density, top), _sparse(rng, shape, 0.03, 1)))
    dense = DenseDelta(rng.standard_normal(_SHAPES[0], np.float32) * np.float32(0.01))
    yield Case(_SHAPES[0], _SPANS[1], (pack(dense, _CPU), _sparse(rng, _SHAPES[0], 0.3, 1)))


def _sparse(rng: np.random.Generator, shape: tuple[int, int], density: float, top: int) -> PackedDelta:
    kept = np.flatnonzero(rng.random(shape) < density).astype(np.int32)
    levels = rng.integers(1, top, len(kept), endpoint=True) * rng.choice([-1, 1], len(kept))
    return pack(SparseDelta(shape, kept, levels.astype(np.int8), 0.05), _CPU)


def check_linear(kernels: Kernels, lab: Lab, rng: np.random.Generator) -> Row:
    """`add_linear` against the reference in float32 on the CPU."""
    worst, count = 0.0, 0
    reference = backend("reference", _CPU)
    for case in _few(cases(rng), lab):
        (out, width), rows = case.shape, case.spans[-1][1] + 3
        x = torch.from_numpy(rng.standard_normal((rows, width), np.float32)).to(lab.dtype)
        before = torch.from_numpy(rng.standard_normal((rows, out), np.float32)).to(lab.dtype)
        outside = torch.ones(rows, dtype=torch.bool)
        for start, stop in case.spans:
            outside[start:stop] = False
        before[outside] = torch.nan
        expected, given = before.float(), before.to(lab.device)
        reference.add_linear(expected, x.float(), _groups(case, case.deltas))
        kernels.add_linear(given, x.to(lab.device), _groups(case, [on_device(d, lab.device) for d in case.deltas]))
        back = given.float().cpu()
        if not back[outside].isnan().all():
            raise AssertionError(f"{kernels.name}: rows that belong to no group were written to ({case.shape})")
        worst = max(worst, _relative(back[~outside], expected[~outside]))
        count += 1
    return _row("mixed: y += Σ weight · x Δᵀ", kernels, count, worst)


def check_fused(kernels: Kernels, lab: Lab, rng: np.random.Generator) -> Row:
    """`fused_linear` into poisoned memory against products in float32 with merged weights on the CPU."""
    worst, count = 0.0, 0
    for case in _few(cases(rng), lab):
        (out, width), rows = case.shape, case.spans[-1][1] + 3
        x = torch.from_numpy(rng.standard_normal((rows, width), np.float32)).to(lab.dtype)
        weight = torch.from_numpy(rng.standard_normal((out, width), np.float32)).to(lab.dtype)
        bias = torch.from_numpy(rng.standard_normal(out, np.float32)).to(lab.dtype) if count % 2 else None
        y = torch.full((rows, out), torch.nan, dtype=lab.dtype, device=lab.device)
        moved = [on_device(delta, lab.device) for delta in case.deltas]
        above = None if bias is None else bias.to(lab.device)
        kernels.fused_linear(y, x.to(lab.device), weight.to(lab.device), above, _groups(case, moved))
        back, outside = y.float().cpu(), torch.ones(rows, dtype=torch.bool)
        for group in _groups(case, case.deltas):
            merged = merge_tensor_reference(weight, group.terms).float()
            own = slice(group.start, group.stop)
            expected = x[own].float() @ merged.T + (0 if bias is None else bias.float())
            worst = max(worst, _relative(back[own], expected))
            outside[own] = False
        if not back[outside].isnan().all():
            raise AssertionError(f"{kernels.name}: rows that belong to no group were written to ({case.shape})")
        count += 1
    return _row("mixed: y = x (W + Σ weight · Δ)ᵀ", kernels, count, worst)


def check_transcode(kernels: Kernels, lab: Lab, rng: np.random.Generator) -> Row:
    """`transcode` against decoding and packing on the CPU, bit by bit."""
    count = 0
    for shape, density in itertools.product(_SHAPES, _STORED):
        tensor = stored(shape, density, int(rng.integers(1 << 30)))
        made, expected = kernels.transcode("t", tensor, lab.device), pack(tensor.decode("t"), _CPU, kernels.lanes)
        fields = [field.name for field in dataclasses.fields(expected)]
        if type(made) is not type(expected) or not all(
            _same(getattr(made, name), getattr(expected, name)) for name in fields
        ):
            raise AssertionError(f"{kernels.name}: what is stored became something else ({shape}, density {density})")
        count += 1
    return _row("stored → packed", kernels, count, 0.0)


def _same(made: object, expected: object) -> bool:
    if isinstance(made, torch.Tensor) and isinstance(expected, torch.Tensor):
        return made.dtype is expected.dtype and torch.equal(made.cpu(), expected)
    return made == expected


def check_merge(kernels: Kernels, lab: Lab, rng: np.random.Generator) -> Row:
    """`merge` into poisoned memory; a single delta bit by bit, and what is below it must be left as it was."""
    worst, count = 0.0, 0
    for case in _few(cases(rng), lab):
        pristine = torch.from_numpy(rng.standard_normal(case.shape, np.float32)).to(lab.dtype)
        for deltas in (case.deltas[:1], case.deltas):
            terms: list[tuple[float, LoadedDelta]] = [(1.0 + number, delta) for number, delta in enumerate(deltas)]
            moved = [(w, on_device(d, lab.device)) for w, d in zip((1.0, 2.0), deltas, strict=False)]
            below, out = pristine.to(lab.device), torch.full(case.shape, torch.nan, dtype=lab.dtype, device=lab.device)
            kernels.merge(out, below, moved)
            expected = merge_tensor_reference(pristine, terms)
            if not torch.equal(below.cpu(), pristine):
                raise AssertionError(f"{kernels.name}: merging wrote to the pristine weights ({case.shape})")
            if len(deltas) == 1 and not torch.equal(out.cpu() + 0.0, expected + 0.0):  # −0 is 0
                raise AssertionError(f"{kernels.name}: a merge is not bit for bit the reference's ({case.shape})")
            worst = max(worst, _relative(out.float().cpu(), expected.float()))
            count += 1
    return _row("merged: W + Σ weight · Δ", kernels, count, worst)


def _few(found: Iterator[Case], lab: Lab) -> Iterator[Case]:
    """All of them on a GPU; elsewhere every seventh, for an interpreter computes them."""
    return found if lab.on_gpu else itertools.islice(found, 0, None, 7)


def _groups(case: Case, deltas: Sequence[PackedDelta]) -> list[Group]:
    """One delta for every other group, a mix of both for the rest."""
    both = tuple(zip((1.0, -0.5), deltas, strict=True))
    return [Group(start, stop, both if place % 2 else both[:1]) for place, (start, stop) in enumerate(case.spans)]


def _relative(given: torch.Tensor, expected: torch.Tensor) -> float:
    error = float((given - expected).norm() / expected.norm())
    return error if error == error else float("inf")


def _row(what: str, kernels: Kernels, count: int, worst: float) -> Row:
    if not worst <= TOLERANCE:
        raise AssertionError(f"{kernels.name}, {what}: a relative error of {worst:.3g} in {count} cases")
    return {"check": what, "kernels": kernels.name, "cases": count, "worst relative error": worst}
