"""The base's layers in eight and four bits: PyTorch's products with them, next to those in full and to the floor."""

from __future__ import annotations

import statistics
from functools import partial

import torch

from bench.gpu_lab import Lab, Work, cycled
from bench.gpu_world import layer_shapes
from bench.report import Row
from server.engine.options import BaseWeights
from server.engine.quantised import FEW, Packed, fits, format_of


def product_rows(lab: Lab) -> list[Row]:
    """Few rows, which read the integers as they are, as `QuantisedLinear` does; each checked before it is timed."""
    found: list[Row] = []
    kinds = {kind.value: format_of(kind, lab.device, None) for kind in (BaseWeights.INT8, BaseWeights.INT4)}
    for name, shape in layer_shapes(lab.effort.size).items():
        weight = torch.randn(shape, device=lab.device).to(lab.dtype)
        for kind, (form, make) in kinds.items():
            if lab.late(f"{kind} {name}"):
                continue
            if not fits(shape, form):
                continue
            layers = [make(weight) for _ in range(2)]
            nbytes = sum(buffer.nbytes for buffer in layers[0].buffers())
            while len(layers) * nbytes < lab.effort.spread_bytes:
                layers.append(make(weight))
            fulls = [weight.clone() for _ in range(max(2, lab.effort.spread_bytes // weight.nbytes))]
            for rows in (1, 8, FEW):
                x = torch.randn(rows, shape[1], device=lab.device).to(lab.dtype)
                error = _error(layers[0], x)
                works: dict[str, list[Work]] = {
                    "packed": [partial(layer.product, x) for layer in layers],
                    "full": [partial(torch.mm, x, full.T) for full in fulls],
                }
                calls = {what: cycled(items, max(4, len(items))) for what, items in works.items()}
                taken = lab.device_seconds(calls, min(5, lab.effort.rounds))
                seconds = {what: statistics.median(times) for what, times in taken.items()}
                floor = lab.floor(nbytes + 2 * rows * sum(shape))
                found.append({"what": f"{kind} {name}", "out × in": f"{shape[0]} × {shape[1]}", "rows": rows,
                              "error": error, "µs": 1e6 * seconds["packed"], "in full µs": 1e6 * seconds["full"],
                              "floor µs": 1e6 * floor, "× floor": seconds["packed"] / floor})  # fmt: skip
    return found


def _error(layer: Packed, x: torch.Tensor) -> float:
    """Relative to the plain product with the same numbers, in double precision.

    Raises:
        ValueError: it is larger than rounding makes it.
    """
    plain = x.double() @ layer.widened().double().T
    error = float((layer.product(x).double() - plain).norm() / plain.norm())
    if not error <= 1e-2:
        raise ValueError(f"the product of {type(layer).__name__} is wrong: relative error {error:.3g}")
    return error
