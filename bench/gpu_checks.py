"""Before anything is timed: does every kernel compute, on this device, what plain PyTorch does on the CPU?

Inputs are drawn anew for every case; what must not be touched holds NaN, and so does what must be overwritten. And does
a decode step with experts, captured as a server captures it, say what the same step says kernel by kernel?
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass

import numpy as np
import torch

from bench.gpu_lab import Lab, Size
from bench.gpu_world import experts_of, mapped, parcel, random_base, stored
from bench.report import Row
from server.engine.attention import AttentionBatch
from server.engine.expert import DecodedExpert
from server.engine.graphs import DecodeGraphs, GraphCapture, eagerly
from server.engine.kernels import Group, Kernels, LoadedDelta, PackedDelta, backend, pack
from server.engine.kernels.merging import merge_tensor_reference
from server.engine.kernels.types import BitPlanes, SparseRows
from server.engine.kv_cache import KVCache
from server.engine.layout import lay_out
from server.engine.mixed import MixedWeights
from server.engine.paged_kernels import best_kernel, best_writer
from server.engine.parcel import Parcel
from server.engine.scheduler import Work
from server.engine.sequence import Sequence
from server.engine.sites import find_sites
from server.engine.types import EngineRequest, SamplingParams
from store.deltas import DenseDelta, SparseDelta
from store.mix import BASE_MIX, Mix

TOLERANCE = 1e-2
"""Relative error of bfloat16 results, as norms."""

_CPU = torch.device("cpu")
_SHAPES = ((160, 96), (33, 70), (256, 224))
_WIDE = ((256, 4096), (96, 14336))
"""Checked on a GPU alone: columns are split among blocks, and rows and tiles of what is merged have several pieces."""
_TALL = (640, 14336)
"""The same: more than one slab of moved weights, and of sums of several deltas."""
_DENSITIES = ((0.012, 1), (0.05, 1), (0.3, 1), (0.2, 7), (1.0, 1))
"""(density, largest level): two of them lists of nonzeros, the others planes."""
_STORED = (0.012, 0.3, 0.5, 0.9)
"""Densities of what is stored: each encoding, and each form that comes out."""
_SPANS = (((0, 1),), ((0, 1), (1, 2), (3, 4)), ((2, 21), (21, 22)), ((0, 70),))
"""Rows of each group: some rows are in none."""
_SIZES = ((0, 1), (1, 4), (5, 38), (40, 240))
"""Rows of groups that take every tile that there is."""
_STEP_SIZE = Size(4096, 14336, 2, 32, 8, 1024, 512)
"""Two of the layers that are timed."""
_STEP_TOLERANCE = 4e-2
"""Relative error of a row's logits after some layers in bfloat16; with another's expert it would be ten times that."""
_STEP_SCALE = 0.05
"""Of the first expert's deltas, next to base weights of 0.02: the expert decides what comes out."""


@dataclass(frozen=True)
class Case:
    """Deltas for groups of rows of one product."""

    shape: tuple[int, int]
    spans: tuple[tuple[int, int], ...]
    deltas: tuple[PackedDelta, ...]


def on_device(delta: PackedDelta, device: torch.device) -> PackedDelta:
    return mapped(delta, lambda tensor: tensor.to(device))


def cases(lab: Lab, rng: np.random.Generator) -> Iterator[Case]:
    """All of them on a GPU; elsewhere every seventh of those of tiny shapes, for an interpreter computes them."""
    few = itertools.product(_SHAPES, _SPANS, _DENSITIES)
    for shape, spans, (density, top) in few if lab.on_gpu else itertools.islice(few, 0, None, 7):
        yield Case(shape, spans, (_sparse(rng, shape, density, top), _sparse(rng, shape, 0.03, 1)))
    if not lab.on_gpu:
        return
    dense = DenseDelta(rng.standard_normal(_SHAPES[0], np.float32) * np.float32(0.01))
    yield Case(_SHAPES[0], _SPANS[1], (pack(dense, _CPU), _sparse(rng, _SHAPES[0], 0.3, 1)))
    for shape, (density, top) in (*itertools.product(_WIDE, _DENSITIES), (_TALL, (0.05, 1)), (_TALL, (0.3, 1))):
        yield Case(shape, _SIZES, (_sparse(rng, shape, density, top), _sparse(rng, shape, 0.03, 1)))


def _sparse(rng: np.random.Generator, shape: tuple[int, int], density: float, top: int) -> PackedDelta:
    kept = np.flatnonzero(rng.random(shape) < density).astype(np.int32)
    levels = rng.integers(1, top, len(kept), endpoint=True) * rng.choice([-1, 1], len(kept))
    return pack(SparseDelta(shape, kept, levels.astype(np.int8), 0.05), _CPU)


def check_linear(kernels: Kernels, lab: Lab, rng: np.random.Generator) -> Row:
    """`add_linear` against the reference in float32 on the CPU."""
    worst, count = 0.0, 0
    reference = backend("reference", _CPU)
    for case in cases(lab, rng):
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
    for case in cases(lab, rng):
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
    for shape, density in itertools.product((*_SHAPES, *(_WIDE if lab.on_gpu else ())), _STORED):
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
    for case in cases(lab, rng):
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


def check_step(kernels: Kernels, lab: Lab) -> Row:
    """Decode steps over fixed tensors, captured on a GPU, as `DecodeGraphs` runs them: the worst row's logits against
    the same step kernel by kernel with the reference's kernels."""
    model = random_base(lab, _STEP_SIZE if lab.on_gpu else lab.effort.size)
    cache = KVCache(model.kv_shape, 40 * model.kv_shape.block_bytes, lab.device)
    cache.attend, cache.write = best_kernel(cache, model.query_heads), best_writer(cache)
    sites = find_sites(model.network, model.parameters, model.try_out)
    plain, mixed = (
        MixedWeights(*sites, model.parameters, each) for each in (backend("reference", lab.device), kernels)
    )
    graphs = DecodeGraphs(model, cache, 32, GraphCapture(lab.device) if lab.on_gpu else eagerly, kernels)
    experts = {expert.digest: expert for density in (0.05, 0.3) for expert in _apart(parcel(model, density), lab)}
    steps = list(_steps(list(experts)))
    steps = steps if lab.on_gpu else [*steps[:2], steps[4]]  # lists, other lists, planes: an interpreter computes them
    worst = 0.0
    for mixes in steps:
        tokens = ((7 * number + 1) % model.vocabulary for number in range(len(mixes)))
        work = [Work(_sequence(cache, mix, token), 1) for mix, token in zip(mixes, tokens, strict=True)]
        layout = lay_out(work)
        with plain.carrying(layout.spans, layout.logit_spans, experts):
            attention = AttentionBatch(layout.segments, cache, lab.device)
            expected = model.forward(layout.tokens, attention, layout.logit_rows)
        got = graphs.run(layout, frozenset(), mixed.terms(layout.spans, layout.logit_spans, experts))
        if got is None:
            raise AssertionError(f"{kernels.name}: a step of {len(mixes)} rows could not be captured")
        worst = max(worst, *(_relative(*rows) for rows in zip(got, expected, strict=True)))
        for item in work:
            cache.release(item.sequence)
    if graphs.captures >= graphs.replays:
        raise AssertionError(f"{kernels.name}: no step was replayed with other experts")
    return _row("captured steps", kernels, len(steps), worst, _STEP_TOLERANCE)


def _apart(template: Parcel, lab: Lab) -> Iterator[DecodedExpert]:
    """Four experts of one form, each of a strength of its own: taken for another one, it shows."""
    for number, expert in enumerate(experts_of(template, 4, lab.device)):
        scale = _STEP_SCALE * (1 + number / 2)
        tensors = {
            name: dataclasses.replace(delta, scale=scale)
            for name, delta in expert.tensors.items()
            if isinstance(delta, BitPlanes | SparseRows)
        }
        yield dataclasses.replace(expert, tensors=tensors)


def _steps(digests: list[str]) -> Iterator[list[Mix]]:
    """Mixes of the rows of each step, those of one mix side by side, the base's in front: lists, planes, and both."""
    for own in (digests[:4], digests[4:], digests[::2]):
        one, two, three, four = (Mix.of({digest: 1.0}) for digest in own)
        yield [one]
        yield [two]
        yield [BASE_MIX, *sorted((one, two, three, four), key=lambda mix: mix.digest)]
        yield [BASE_MIX] * 4 + [three] * 28
    yield [Mix.of({digests[0]: 0.5, digests[1]: -0.7})] * 3


def _sequence(cache: KVCache, mix: Mix, token: int) -> Sequence:
    """One whose first token is to be computed."""
    sequence = Sequence(EngineRequest((token,), SamplingParams(1), mix), 1, emit=lambda _: None)
    if not cache.grow(sequence, 1):
        raise RuntimeError("the cache is too small for the batch")
    return sequence


def _groups(case: Case, deltas: Items[PackedDelta]) -> list[Group]:
    """One delta for every other group, a mix of both for the rest."""
    both = tuple(zip((1.0, -0.5), deltas, strict=True))
    return [Group(start, stop, both if place % 2 else both[:1]) for place, (start, stop) in enumerate(case.spans)]


def _relative(given: torch.Tensor, expected: torch.Tensor) -> float:
    error = float((given - expected).norm() / expected.norm())
    return error if error == error else float("inf")


def _row(what: str, kernels: Kernels, count: int, worst: float, tolerance: float = TOLERANCE) -> Row:
    if not worst <= tolerance:
        raise AssertionError(f"{kernels.name}, {what}: a relative error of {worst:.3g} in {count} cases")
    return {"check": what, "kernels": kernels.name, "cases": count, "worst relative error": worst}
