"""Which tiles are the fastest for the kernels that add beside the base? `python -m bench.gpu_tune` sweeps them.

Every candidate runs on the shapes of an 8B model's layers, for the batches that servers have; what is printed are the
fastest of each batch, summed over a layer, next to the floor and to the choice of `gpu_variants`. With `--compile K/N`
it compiles one share of the candidates, without a GPU, into Triton's cache, and times nothing.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.gpu_checks import on_device
from bench.gpu_kernels import _sets
from bench.gpu_lab import DRY, FULL, Lab, Work, turned
from bench.gpu_world import layer_shapes, random_delta
from bench.report import RESULTS, Row, show, write
from server.engine.kernels import Group, gpu, gpu_variants
from server.engine.kernels.gpu_bytes import add_bytes, split_rows
from server.engine.kernels.gpu_lists import add_lists, add_sparse

_TIMES = {"q": 2, "k": 2, "gate": 2, "down": 1}
"""How often a layer has such a matrix."""

_LISTS = 0.05
"""Densities up to which deltas are lists of nonzeros."""
_PAUSE = 4_000_000


@dataclass(frozen=True)
class Batch:
    """Rows of a decode step, evenly on so many experts of a density."""

    density: float
    rows: int
    experts: int


@dataclass(frozen=True)
class Tile:
    """What is tried: N weight rows, J words or E entries at a time; blocks for each processor where columns are cut."""

    wide: int
    long: int
    warps: int
    stages: int = 0
    blocks: int = 0


BATCHES = (
    *(Batch(0.1, rows, experts) for rows, experts in ((1, 1), (8, 8), (32, 1), (32, 32))),
    *(Batch(0.012, rows, experts) for rows, experts in ((1, 1), (8, 8), (32, 1), (32, 32))),
)


def candidates(lab: Lab, batch: Batch) -> list[Tile]:
    """Tiles for a batch; on a CPU two of them."""
    if batch.density > _LISTS:
        shapes = ((64, 4), (128, 4), (128, 8), (256, 8))
        found = [
            Tile(wide, long, warps, stages, blocks)
            for (wide, warps), long, stages, blocks in itertools.product(shapes, (4, 8), (2, 3, 4), (1, 2))
        ]
    elif batch.rows == batch.experts:
        sizes = itertools.product((8, 16, 32, 64, 128), (8, 16, 32), (1, 2, 4, 8))
        found = [Tile(*size) for size in sizes if 64 * size[2] <= size[0] * size[1] <= 1024 * size[2]]
    else:
        sizes = itertools.product((4, 8, 16), (8, 16, 32, 64), (2, 4, 8))
        found = [Tile(*size) for size in sizes if size[0] * size[1] <= 128 * size[2]]
    return found if lab.on_gpu else found[:2]


@contextmanager
def trying(tile: Tile, batch: Batch, kernels: gpu.TritonKernels | None = None) -> Iterator[None]:
    """Within, launches take that tile."""
    if kernels is not None:
        kernels._devices.clear()  # its scratch memory is for as many blocks as there were
    known = (gpu_variants.in_bytes, gpu_variants.sparse, gpu_variants.SPLIT, gpu._BLOCKS_PER_PROCESSOR, gpu._TILE_SUMS)
    planes, lists, *_ = known

    def other_planes(*given: Any) -> gpu_variants.Fixed:
        return {**planes(*given), "N": tile.wide, "J": tile.long, "STAGES": tile.stages, "num_warps": tile.warps}

    def other_lists(*given: Any) -> gpu_variants.Fixed:
        return {**lists(*given), "N": tile.wide, "E": tile.long, "num_warps": tile.warps}

    gpu_variants.in_bytes, gpu_variants.sparse = other_planes, other_lists  # type: ignore[assignment]
    if batch.density > _LISTS:
        gpu_variants.SPLIT = {**gpu_variants.SPLIT, "J": tile.long}
        gpu._BLOCKS_PER_PROCESSOR, gpu._TILE_SUMS = tile.blocks, 256 * 32
    try:
        yield
    finally:
        (
            gpu_variants.in_bytes, gpu_variants.sparse, gpu_variants.SPLIT, gpu._BLOCKS_PER_PROCESSOR, gpu._TILE_SUMS
        ) = known  # fmt: skip


def compile_share(share: int, of: int) -> None:
    """Every `of`-th candidate, for an H100 or H200."""
    from triton.runtime import driver

    from tests.engine.kernels.prepare_gpu import Absent

    driver.set_active(Absent())
    lab: Any = type("OnGpu", (), {"on_gpu": True})
    fixed: list[tuple[Any, gpu_variants.Fixed]] = []
    for batch in BATCHES:
        for tile in candidates(lab, batch):
            with trying(tile, batch):
                if batch.density > _LISTS:
                    side = 8 if batch.rows == batch.experts else 32
                    fixed.append((split_rows, gpu_variants.SPLIT))
                    for splits in gpu_variants.SPLITS:
                        fixed.append((add_bytes, gpu_variants.in_bytes(side, 4096, splits)))
                elif batch.rows == batch.experts:
                    for width in (4096, 14336):
                        fixed.append((add_lists, gpu_variants.sparse(1, width, True, False)))
                else:
                    fixed.append((add_sparse, gpu_variants.sparse(32, 4096, True, False)))
    distinct = {(kernel.__name__, *sorted(map(str, one.items()))): (kernel, one) for kernel, one in fixed}
    for kernel, one in list(distinct.values())[share::of]:
        gpu_variants.Variant(kernel, torch.bfloat16, one).compile()


def seconds_of(lab: Lab, calls: dict[str, list[Work]], rounds: int) -> float:
    """Of the adds of one layer."""
    total = 0.0
    for name, works in calls.items():
        timed = lab.device_seconds({"": turned(works, 8)}, rounds)[""]
        total += _TIMES[name] * statistics.median(timed)
    return total


def tune(lab: Lab, batch: Batch, kernels: gpu.TritonKernels, rounds: int) -> list[Row]:
    """All candidates on one batch, today's choice first."""
    calls: dict[str, list[Work]] = {}
    floor = 0.0
    per = batch.rows // batch.experts
    for name, shape in layer_shapes(lab.effort.size).items():
        template = on_device(random_delta(shape, batch.density), lab.device)
        y = torch.zeros(batch.rows, shape[0], dtype=lab.dtype, device=lab.device)
        x = torch.randn(batch.rows, shape[1], device=lab.device).to(lab.dtype)
        calls[name] = [
            partial(
                kernels.add_linear,
                y,
                x,
                [Group(i * per, (i + 1) * per, ((1.0, delta),)) for i, delta in enumerate(deltas)],
            )
            for deltas in _sets(lab, template, batch.experts)
        ]
        floor += _TIMES[name] * lab.floor(batch.experts * template.nbytes + x.nbytes + 2 * y.nbytes)
    what: Row = {"density": batch.density, "rows": batch.rows, "experts": batch.experts}
    seconds = seconds_of(lab, calls, rounds)
    found: list[Row] = [
        {**what, "tile": "as it is", "µs a layer": 1e6 * seconds, "floor µs": 1e6 * floor, "× floor": seconds / floor}
    ]
    for tile in candidates(lab, batch):
        if lab.seconds_left < 0:
            break
        try:
            with trying(tile, batch, kernels):
                seconds = seconds_of(lab, calls, rounds)
        except Exception as error:  # too much shared memory, say
            found.append({**what, "tile": str(tile), "note": str(error)[:80]})
            continue
        found.append({**what, "tile": str(tile), "µs a layer": 1e6 * seconds, "floor µs": 1e6 * floor,
                      "× floor": seconds / floor})  # fmt: skip
    return found


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU; proves that every line runs")
    parser.add_argument("--compile", metavar="K/N", help="compile one share of N, and time nothing")
    parser.add_argument("--seconds", type=float, default=120.0, help="after which nothing new begins (default 120)")
    parser.add_argument("--out", type=Path, help="folder of the JSON (default bench/results; of a dry run: nowhere)")
    arguments = parser.parse_args()
    if arguments.compile:
        compile_share(*map(int, arguments.compile.split("/")))
        return 0
    device = torch.device("cpu") if arguments.dry_run else torch.empty(0, device="cuda").device
    lab = Lab(device, DRY if arguments.dry_run else replace(FULL, spread_bytes=128 << 20), arguments.seconds, _PAUSE)
    kernels = gpu.TritonKernels()
    rows: list[Row] = []
    with torch.no_grad():
        for batch in BATCHES if lab.on_gpu else BATCHES[1::4]:
            found = tune(lab, batch, kernels, 2 if lab.on_gpu else 1)
            rows += found
            best = sorted((row for row in found[1:] if "× floor" in row), key=lambda row: float(str(row["× floor"])))
            show([found[0], *best[:6]], title=str(batch))
            sys.stdout.flush()
    folder = arguments.out or (None if arguments.dry_run else RESULTS)
    if folder is not None:
        write("gpu_tune", "python -m bench.gpu_tune", rows, [], folder=folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
