"""Kernels by shape, density and number of rows: device time, the floor of what they move and compute, and the ratio."""

from __future__ import annotations

import math
import statistics
from functools import partial

import torch

from bench.gpu_checks import on_device
from bench.gpu_lab import Lab, Work, turned
from bench.gpu_world import layer_shapes, mapped, random_delta, stored
from bench.report import Row
from server.engine.kernels import Group, Kernels, PackedDelta


def linear_rows(lab: Lab, kernels: Kernels) -> list[Row]:
    """Mixed mode's products: one expert for all rows, and one for each row."""
    found: list[Row] = []
    for name, shape in layer_shapes(lab.effort.size).items():
        out, width = shape
        for density in lab.effort.densities:
            if lab.late(f"{name} at density {density}"):
                continue
            template = on_device(random_delta(shape, density), lab.device)
            for rows in lab.effort.rows:
                kinds = {"one expert": 1} | ({"an expert per row": rows} if 1 < rows <= 32 else {})
                for kind, experts in kinds.items():
                    if lab.late(f"{name} at density {density}, {rows} rows, {kind}"):
                        continue
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
            if lab.late(f"{name} at density {density}"):
                continue
            template = on_device(random_delta(shape, density), lab.device)
            pristine = torch.randn(shape, device=lab.device).to(lab.dtype)
            calls: list[Work] = [
                partial(kernels.merge, torch.empty_like(pristine), pristine.clone(), [(1.0, deltas[0])])
                for deltas in _sets(lab, template, 1, 2 * pristine.nbytes)
            ]
            floor = lab.floor(2 * pristine.nbytes + template.nbytes)
            found.append(_timed(lab, calls, f"merge {name}", shape, density, "one expert", 0, floor, template))
    return found


def fused_rows(lab: Lab, kernels: Kernels) -> list[Row]:
    """Prompts: one product with moved weights, next to the base's alone and to the base's with a delta beside it."""
    found: list[Row] = []
    for name, shape in layer_shapes(lab.effort.size).items():
        out, width = shape
        for density in lab.effort.densities:
            if lab.late(f"{name} at density {density}"):
                continue
            template = on_device(random_delta(shape, density), lab.device)
            for rows in lab.effort.prompts:
                if lab.late(f"{name} at density {density}, {rows} rows"):
                    continue
                x = torch.randn(rows, width, device=lab.device).to(lab.dtype)
                y = torch.empty(rows, out, dtype=lab.dtype, device=lab.device)
                weight = torch.randn(shape, device=lab.device).to(lab.dtype)
                pairs = [
                    (weight.clone(), Group(0, rows, ((1.0, deltas[0]),)))
                    for deltas in _sets(lab, template, 1, 2 * weight.nbytes)
                ]
                works: dict[str, list[Work]] = {
                    "fused": [partial(kernels.fused_linear, y, x, w, None, [group]) for w, group in pairs],
                    "base": [partial(torch.mm, x, w.T, out=y) for w, _ in pairs],
                    "beside": [partial(_beside, kernels, y, x, w, group) for w, group in pairs],
                }
                floor = lab.floor(weight.nbytes + template.nbytes + x.nbytes + y.nbytes, 2 * rows * out * width)
                found.append(_compared(lab, works, f"fused_linear {name}", shape, density, rows, floor, template))
    return found


def _beside(kernels: Kernels, y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, group: Group) -> None:
    torch.mm(x, weight.T, out=y)
    kernels.add_linear(y, x, [group])


def _compared(
    lab: Lab,
    works: dict[str, list[Work]],
    what: str,
    shape: tuple[int, int],
    density: float,
    rows: int,
    floor: float,
    template: PackedDelta,
) -> Row:
    calls = {name: turned(items, 4 * lab.effort.calls - 3) for name, items in works.items()}
    taken = lab.device_seconds(calls, min(3, lab.effort.rounds))
    seconds = {name: statistics.median(times) for name, times in taken.items()}
    row = _row(what, shape, density, "one expert", rows, seconds["fused"], floor, template.nbytes)
    return {**row, "base alone µs": 1e6 * seconds["base"], "beside the base µs": 1e6 * seconds["beside"]}


def transcode_rows(lab: Lab, kernels: Kernels) -> list[Row]:
    """From the bytes of an expert file to what the kernels read, as a loader waits for it.

    The floor: what is stored comes over the bus; it is read, and the packed form written, at the speed of memory.
    """
    found: list[Row] = []
    shapes = layer_shapes(lab.effort.size)
    for name in ("q", "k"):
        for density in lab.effort.densities:
            if lab.late(f"{name} at density {density}"):
                continue
            tensor = stored(shapes[name], density)
            made = kernels.transcode(name, tensor, lab.device)
            works: dict[str, list[Work]] = {"": [partial(kernels.transcode, name, tensor, lab.device)] * 3}
            seconds = statistics.median(lab.wall_seconds(works, min(5, lab.effort.rounds))[""])
            floor = max(tensor.nbytes / lab.carried, lab.floor(tensor.nbytes + made.nbytes))
            what = f"transcode {name} ({tensor.encoded.name})"
            found.append(_row(what, shapes[name], density, "one expert", 0, seconds, floor, tensor.nbytes))
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
    works = {"": turned(calls, 4 * lab.effort.calls - 3)}
    seconds = statistics.median(lab.device_seconds(works, min(3, lab.effort.rounds))[""])
    return _row(what, shape, density, kind, rows, seconds, floor, template.nbytes)


def _row(
    what: str,
    shape: tuple[int, int],
    density: float,
    kind: str,
    rows: int,
    seconds: float,
    floor: float,
    nbytes: int,
) -> Row:
    return {
        "what": what,
        "out × in": f"{shape[0]} × {shape[1]}",
        "density": density,
        "bits/weight": 8 * nbytes / math.prod(shape),
        "rows": rows or None,
        "for": kind,
        "µs": 1e6 * seconds,
        "floor µs": 1e6 * floor,
        "× floor": seconds / floor,
    }


def _sets(lab: Lab, template: PackedDelta, experts: int, beside: int = 0) -> list[list[PackedDelta]]:
    """Several sets of experts, together larger than the card's cache, all in memory of their own.

    Args:
        beside: bytes that each set's call moves besides.
    """
    count = max(2, math.ceil(lab.effort.spread_bytes / (experts * template.nbytes + beside)))
    return [[mapped(template, torch.clone) for _ in range(experts)] for _ in range(count)]
