"""Kernels by shape, density and number of rows: device time, the floor of what they move and compute, and the ratio."""

from __future__ import annotations

import math
import statistics
from functools import partial

import torch

from bench.gpu_checks import on_device
from bench.gpu_lab import Lab, Work, cycled
from bench.gpu_world import layer_shapes, mapped, random_delta
from bench.report import Row
from server.engine.kernels import Group, Kernels, PackedDelta


def linear_rows(lab: Lab, kernels: Kernels) -> list[Row]:
    """Mixed mode's products: one expert for all rows, and one for each row."""
    found: list[Row] = []
    for name, shape in layer_shapes(lab.effort.size).items():
        out, width = shape
        for density in lab.effort.densities:
            template = on_device(random_delta(shape, density), lab.device)
            for rows in lab.effort.rows:
                kinds = {"one expert": 1} | ({"an expert per row": rows} if 1 < rows <= 32 else {})
                for kind, experts in kinds.items():
                    if lab.seconds_left < 0:
                        return found
                    sets = _sets(lab, template, experts)
                    y = torch.zeros(rows, out, dtype=lab.dtype, device=lab.device)
                    x = torch.randn(rows, width, device=lab.device).to(lab.dtype)
                    calls: list[Work] = []
                    for deltas in sets:
                        per = rows // experts
                        groups = [Group(i * per, (i + 1) * per, ((1.0, delta),)) for i, delta in enumerate(deltas)]
                        calls.append(partial(kernels.add_linear, y, x, groups))
                    moved = experts * template.nbytes + x.nbytes + 2 * y.nbytes
                    floor = lab.floor(moved, 2 * rows * out * width)
                    found.append(_timed(lab, calls, f"add_linear {name}", shape, density, kind, rows, floor, template))
    return found


def merge_rows(lab: Lab, kernels: Kernels) -> list[Row]:
    """Merged mode's patches of single tensors."""
    found: list[Row] = []
    for name, shape in layer_shapes(lab.effort.size).items():
        for density in lab.effort.densities:
            if lab.seconds_left < 0:
                return found
            template = on_device(random_delta(shape, density), lab.device)
            pristine = torch.randn(shape, device=lab.device).to(lab.dtype)
            count = _count(lab, 2 * pristine.nbytes)
            pairs = [(torch.empty_like(pristine), pristine.clone()) for _ in range(count)]
            calls: list[Work] = [partial(kernels.merge, out, below, [(1.0, template)]) for out, below in pairs]
            floor = lab.floor(2 * pristine.nbytes + template.nbytes)
            found.append(_timed(lab, calls, f"merge {name}", shape, density, "one expert", 0, floor, template))
    return found


def _timed(
    lab: Lab,
    calls: list[Work],
    what: str,
    shape: tuple[int, int],
    density: float,
    kind: str,
    rows: int,
    floor: float,
    template: PackedDelta,
) -> Row:
    works = {"": cycled(calls, max(4 * lab.effort.calls - 3, len(calls)))}
    seconds = statistics.median(lab.device_seconds(works, min(3, lab.effort.rounds))[""])
    return {
        "what": what,
        "out × in": f"{shape[0]} × {shape[1]}",
        "density": density,
        "bits/weight": 8 * template.nbytes / math.prod(shape),
        "rows": rows or None,
        "for": kind,
        "µs": 1e6 * seconds,
        "floor µs": 1e6 * floor,
        "× floor": seconds / floor,
    }


def _count(lab: Lab, nbytes: int) -> int:
    return max(2, min(64, math.ceil(lab.effort.spread_bytes / nbytes)))


def _sets(lab: Lab, template: PackedDelta, experts: int) -> list[list[PackedDelta]]:
    """Several sets of experts, together larger than the card's cache, all in memory of their own."""
    return [
        [mapped(template, torch.clone) for _ in range(experts)] for _ in range(_count(lab, experts * template.nbytes))
    ]
