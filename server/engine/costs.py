"""What steps, deltas and patches cost on this machine: measured at start, on the loaded base, in about two seconds."""

from __future__ import annotations

import math
import time
from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from server.engine.attention import AttentionBatch, Segment
from server.engine.expert import DecodedExpert
from server.engine.kernels import Group, Kernels, LoadedDelta, PackedDelta, pack
from server.engine.kernels.types import BitPlanes, DenseValues, Overwrites, SparseRows
from server.engine.model import BaseModel
from server.engine.native_steps import NativeSteps
from store.deltas import DenseDelta, SparseDelta

_ROWS = (1, 8, 32)
_REPEATS = 3
_STEP_SECONDS, _DELTA_SECONDS = 1.2, 0.2
"""Most time for measuring steps, and for each form of delta; what does not fit is extrapolated."""
_ELEMENTS = 1 << 20
"""Most elements of the synthetic deltas."""

Form = type[LoadedDelta]


@dataclass(frozen=True)
class Curve:
    """Seconds as a function of rows: linear between measured points and beyond the last two."""

    points: tuple[tuple[int, float], ...]

    def __call__(self, rows: int) -> float:
        if len(self.points) == 1:
            ((measured, seconds),) = self.points
            return seconds * max(1.0, rows / measured)
        at = min(max(1, bisect_left(self.points, rows, key=lambda point: point[0])), len(self.points) - 1)
        (low, before), (high, after) = self.points[at - 1 : at + 1]
        return before + max(0.0, after - before) * max(0, rows - low) / (high - low)


@dataclass(frozen=True)
class Costs:
    """Seconds on this machine.

    Attributes:
        step: one step of the base.
        delta: per element of a tensor, by the form of its delta, applied to rows beside the weights.
        patch: per element of a tensor, by the form of its delta, folded into the weights.
    """

    step: Curve
    delta: Mapping[Form, Curve]
    patch: Mapping[Form, float]

    def surcharge(self, expert: DecodedExpert, rows: int) -> float:
        """What an expert adds to a mixed step in which it has so many rows."""
        return sum(count * self.delta[form](rows) for form, count in _elements(expert).items())

    def patching(self, expert: DecodedExpert) -> float:
        """What it takes to fold an expert into the weights."""
        return sum(count * self.patch[form] for form, count in _elements(expert).items())


def _elements(expert: DecodedExpert) -> dict[Form, int]:
    counts: dict[Form, int] = {}
    for delta in expert.tensors.values():
        counts[type(delta)] = counts.get(type(delta), 0) + math.prod(delta.shape)
    return counts


def calibrate(model: BaseModel, kernels: Kernels, fast: NativeSteps | None = None) -> Costs:
    """Measure steps of the base, and the two ways to apply synthetic deltas of the size of its layers.

    Args:
        fast: what runs steps, if not the model's modules; it adds deltas in float32, and coarsely to other weights.
    """
    steps: list[tuple[int, float]] = []
    started = time.perf_counter()
    for rows in _ROWS:
        batch = AttentionBatch([Segment(row, row + 1, 0, ()) for row in range(rows)], None, model.device)
        tokens, wanted = [0] * rows, list(range(rows))

        def step(tokens: list[int] = tokens, batch: AttentionBatch = batch, wanted: list[int] = wanted) -> None:
            if fast is None:
                model.forward(tokens, batch, wanted)
            else:
                fast.try_out(len(tokens))

        steps.append((rows, _seconds(step, model.device, _STEP_SECONDS / len(_ROWS))))
        if time.perf_counter() - started > _STEP_SECONDS / 2:
            break
    dtype = model.dtype if fast is None else torch.float32
    apply = kernels.add_linear
    if fast is not None and model.dtype is not torch.float32:
        apply = fast.kernels.add_coarsely
    delta: dict[Form, Curve] = {}
    patch: dict[Form, float] = {}
    for form, packed in _synthetic(model, kernels).items():
        out, size = packed.shape
        curve = []
        for rows in _ROWS:
            group = Group(0, rows, ((1.0, packed),))
            x = torch.ones(rows, size, dtype=dtype, device=model.device)
            y = torch.zeros(rows, out, dtype=dtype, device=model.device)

            def add(x: torch.Tensor = x, y: torch.Tensor = y, group: Group = group) -> None:
                apply(y, x, [group])

            curve.append((rows, _seconds(add, model.device, _DELTA_SECONDS / 4) / (out * size)))
        pristine = torch.zeros(out, size, dtype=model.dtype, device=model.device)
        merged = torch.empty_like(pristine)

        def merge(packed: PackedDelta = packed, out: torch.Tensor = merged, pristine: torch.Tensor = pristine) -> None:
            kernels.merge(out, pristine, [(1.0, packed)])

        delta[form] = Curve(tuple(curve))
        patch[form] = _seconds(merge, model.device, _DELTA_SECONDS / 4) / (out * size)
    # What overwrites is never applied beside; to patch, it is at most as dear as a delta for every element.
    delta[Overwrites], patch[Overwrites] = delta[DenseValues], patch[DenseValues]
    return Costs(Curve(tuple(steps)), delta, patch)


def _synthetic(model: BaseModel, kernels: Kernels) -> dict[type[PackedDelta], PackedDelta]:
    """A delta of every form, of the shape of the model's largest layer or of some of its rows."""
    layers = [p.shape for name, p in model.parameters.items() if p.ndim == 2 and ".layers." in f".{name}"]
    out, size = max(layers, key=math.prod, default=torch.Size((1024, 1024)))
    shape = (max(1, min(out, _ELEMENTS // size)), size)
    rng = np.random.default_rng(0)
    made = [pack(DenseDelta(rng.standard_normal(shape, np.float32)), model.device)]
    for density in (0.3, 0.01):
        indices = np.flatnonzero(rng.random(math.prod(shape)) < density).astype(np.int32)
        levels = rng.choice(np.array([-1, 1], np.int8), len(indices))
        made.append(pack(SparseDelta(shape, indices, levels, 0.01), model.device, kernels.lanes, kernels.lists_below))
    forms: dict[type[PackedDelta], PackedDelta] = {type(delta): delta for delta in made}
    for missing in {BitPlanes, SparseRows, DenseValues} - forms.keys():
        forms[missing] = made[0]  # tensors of this shape never take it: the price of the dense form is an upper bound
    return forms


def _seconds(run: Callable[[], None], device: torch.device, budget: float) -> float:
    """The shortest of a few runs, after one to warm up unless it used up the budget."""
    best = math.inf
    started = time.perf_counter()
    for attempt in range(1 + _REPEATS):
        began = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken = time.perf_counter() - began
        best = taken if attempt == 1 else min(best, taken)
        if time.perf_counter() - started > budget:
            break
    return best
