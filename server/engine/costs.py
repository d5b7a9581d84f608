"""What steps, deltas and patches cost on this machine: measured at start, on the loaded base, in about two seconds."""

from __future__ import annotations

import math
import time
from bisect import bisect_left
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass
from functools import partial

import torch

from server.engine.attention import Segment
from server.engine.executor import Executor
from server.engine.expert import DecodedExpert
from server.engine.kernels import Kernels, LoadedDelta
from server.engine.kernels.types import BitPlanes, ByteLists, DenseValues, Overwrites, SparseRows
from server.engine.layout import Layout, Span
from server.engine.model import BaseModel
from server.engine.native_steps import NativeSteps
from server.engine.synthetic import forms_of, synthetic_expert
from store.mix import BASE_MIX, Mix

_ROWS = (1, 8, 32)
_REPEATS = 3
_STEP_SECONDS, _DELTA_SECONDS, _PATCH_SECONDS = 1.0, 0.3, 0.1
"""Most time for measuring steps of the base, those with each form of delta, and patches of each; what does not fit is
extrapolated."""
_PATCHED = 1 << 25
"""Most elements of the matrices that are patched to measure it, but for a larger one: more than caches hold."""

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
        delta: per unit of what is read of a delta (`units`), by its form, applied to rows beside the weights.
        patch: per element of a tensor, by the form of its delta, folded into the weights.
    """

    step: Curve
    delta: Mapping[Form, Curve]
    patch: Mapping[Form, float]

    def surcharge(self, expert: DecodedExpert, rows: int) -> float:
        """What an expert adds to a mixed step in which it has so many rows."""
        return sum(count * self.delta[form](rows) for form, count in _counts(expert, units).items())

    def patching(self, expert: DecodedExpert) -> float:
        """What it takes to fold an expert into the weights."""
        counts = _counts(expert, lambda delta: math.prod(delta.shape))
        return sum(count * self.patch[form] for form, count in counts.items())


def units(delta: LoadedDelta) -> int:
    """What the time beside the weights is proportional to: elements, once for every digit, or what lists have."""
    if isinstance(delta, SparseRows | ByteLists):
        return delta.entries.numel()
    return math.prod(delta.shape) * (delta.digits if isinstance(delta, BitPlanes) else 1)


def _counts(expert: DecodedExpert, count: Callable[[LoadedDelta], int]) -> dict[Form, int]:
    counts: dict[Form, int] = {}
    for delta in expert.tensors.values():
        counts[type(delta)] = counts.get(type(delta), 0) + count(delta)
    return counts


def calibrate(model: BaseModel, executor: Executor, kernels: Kernels, most_rows: int) -> Costs:
    """Measure steps as the executor runs them, of the base and with synthetic experts that move all matrices of its
    layers; and what folding these into some of the weights takes.

    Before the cache is used: its first block is written to.

    Args:
        most_rows: of a step that only decodes.
    """
    shapes = {name: (p.shape[0], p.shape[1]) for name, p in model.parameters.items() if _is_layer(name, p)}
    measured = [rows for rows in _ROWS if rows < most_rows] + [min(_ROWS[-1], most_rows)]
    steps = _curve(lambda rows: _step_seconds(executor, model.device, rows, None), measured, _STEP_SECONDS)
    delta: dict[Form, Curve] = {}
    patch: dict[Form, float] = {}
    for form in forms_of(kernels):
        expert = synthetic_expert(form, shapes, model.device, kernels)
        count = max(1, sum(units(own) for own in expert.tensors.values()))
        beside = partial(_beside_seconds, executor, model.device, expert=expert, base=steps)
        taken = _curve(beside, measured, _DELTA_SECONDS)
        delta[form] = Curve(tuple((rows, seconds / count) for rows, seconds in taken.points))
        patch[form] = _patch_seconds(model, expert, kernels)
    executor.begin_anew()
    # At most as dear as a delta for every element.
    patch[Overwrites] = patch[DenseValues]
    return Costs(steps, delta, patch)


def _is_layer(name: str, parameter: torch.Tensor) -> bool:
    return parameter.ndim == 2 and ".layers." in f".{name}"


def _curve(seconds: Callable[[int], float], rows: Items[int], budget: float) -> Curve:
    """Of as many numbers of rows as time allows, two at least, the shortest of a few runs each."""
    points: list[tuple[int, float]] = []
    spent = 0.0
    for count in rows:
        if len(points) > 1 and spent > budget / 2:
            break
        least, taken = _least(partial(seconds, count), budget / len(rows))
        points.append((count, least))
        spent += taken
    return Curve(tuple(points))


def _step_seconds(executor: Executor, device: torch.device, rows: int, expert: DecodedExpert | None) -> float:
    """What a step takes whose rows, a token each, are all of the base or of one expert."""
    mix = BASE_MIX if expert is None else Mix.of({expert.digest: 1.0})
    span = (Span(mix, 0, rows),)
    segments = [Segment(row, row + 1, 0, (1,)) for row in range(rows)]
    layout = Layout([0] * rows, segments, list(range(rows)), [], span, span)
    experts = {} if expert is None else {expert.digest: expert}
    began = time.perf_counter()
    executor.logits(layout, experts, mixed=True)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def _beside_seconds(
    executor: Executor, device: torch.device, rows: int, *, expert: DecodedExpert, base: Curve
) -> float:
    """What an expert adds to such a step.

    On a CPU it is timed as it happens, which the machine's other work disturbs less than the difference of two steps.
    On a GPU what is launched takes its time later, and what native steps leave to the modules costs more than itself.
    """
    native = executor.fast if isinstance(executor.fast, NativeSteps) else None
    before, steps = executor.mixed.seconds, 0 if native is None else native.steps
    taken = _step_seconds(executor, device, rows, expert)
    if device.type == "cpu" and (native is None or native.steps > steps):
        return executor.mixed.seconds - before
    return max(0.0, taken - base(rows))


def _patch_seconds(model: BaseModel, expert: DecodedExpert, kernels: Kernels) -> float:
    """What it takes per element to fold an expert into matrices of the layers, whose buffers have been used before."""
    names: list[str] = []
    count = 0
    for name, own in expert.tensors.items():
        if names and count + math.prod(own.shape) > _PATCHED:
            break
        names.append(name)
        count += math.prod(own.shape)
    if not names:
        return 0.0
    pristine = [model.parameters[name].data for name in names]
    buffers = [torch.empty_like(tensor) for tensor in pristine]

    def merge() -> float:
        began = time.perf_counter()
        for name, buffer, tensor in zip(names, buffers, pristine, strict=True):
            kernels.merge(buffer, tensor, [(1.0, expert.tensors[name])])
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)
        return time.perf_counter() - began

    return _least(merge, _PATCH_SECONDS)[0] / count


def _least(run: Callable[[], float], budget: float) -> tuple[float, float]:
    """The shortest of a few runs, one at least, and what all took. Another before them counts for nothing: the first
    step of all takes forty times as long."""
    run()
    started = time.perf_counter()
    best = run()
    for _ in range(_REPEATS - 1):
        if time.perf_counter() - started > budget:
            break
        best = min(best, run())
    return best, time.perf_counter() - started
