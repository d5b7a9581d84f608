"""How fast are the kernels of mixed mode, and how far from what the machine permits?

`python -m bench.kernels` times every implementation that runs here on the shapes of SmolLM2-135M, by density and
number of rows, against the time in which memory delivers the packed bytes; then whole decode steps: the linear layers
of the base alone, and with 8 rows on 8 experts, or on one. Deltas and weights are random; there are several of each,
more than the caches hold. `--quick` makes fewer of everything.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from bench.report import ROOT, Row, show, write
from server.engine.kernels import Group, Kernels, PackedDelta, available, backend, pack
from server.engine.kernels.packing import SPARSE_BELOW
from server.engine.kernels.types import BitPlanes, SparseRows
from store.deltas import SparseDelta

CPU = torch.device("cpu")
HIDDEN, INTERMEDIATE, KEYS = 576, 1536, 192
LAYER = ((HIDDEN, HIDDEN), (KEYS, HIDDEN), (KEYS, HIDDEN), (HIDDEN, HIDDEN)) + (
    ((INTERMEDIATE, HIDDEN),) * 2 + ((HIDDEN, INTERMEDIATE),)
)
"""(out, in) of the linear layers of one decoder layer of SmolLM2-135M, of which it has 30."""
SHAPES = ((KEYS, HIDDEN), (HIDDEN, HIDDEN), (INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE))
DENSITIES = (0.012, 0.05, 0.1, 0.2, 0.4)
ROWS = (1, 2, 4, 8, 64, 256)
EXPERTS = 8
BEYOND_CACHES = 96 << 20
"""Bytes of deltas that one timing goes through, where it is in the time."""

Shape = tuple[int, int]


@dataclass(frozen=True)
class Effort:
    """How much of everything."""

    shapes: tuple[Shape, ...]
    densities: tuple[float, ...]
    rows: tuple[int, ...]
    layers: int
    rounds: int
    spread_bytes: int


FULL = Effort(SHAPES, DENSITIES, ROWS, 30, 11, BEYOND_CACHES)
QUICK = Effort(SHAPES[2:3], (0.012, 0.4), (1, 8, 64), 6, 5, 4 << 20)


def random_delta(
    shape: Shape, density: float, seed: int = 0, top: int = 1, lanes: int = 1, lists_below: float = SPARSE_BELOW
) -> PackedDelta:
    """A delta of exactly that density and of levels up to `top`, packed."""
    rng = np.random.default_rng(seed)
    numel = shape[0] * shape[1]
    kept = np.sort(rng.choice(numel, round(density * numel), replace=False)).astype(np.int32)
    levels = rng.choice(np.array([-1, 1], np.int8), len(kept)) * rng.integers(1, top, len(kept), np.int8, endpoint=True)
    return pack(SparseDelta(shape, kept, levels, 0.01), CPU, lanes, lists_below)


def copies(delta: PackedDelta, count: int) -> list[PackedDelta]:
    """Deltas of the same contents in memory of their own."""
    if isinstance(delta, BitPlanes):
        return [replace(delta, words=delta.words.clone()) for _ in range(count)]
    assert isinstance(delta, SparseRows)
    lists = ("order", "starts", "entries")
    return [replace(delta, **{name: getattr(delta, name).clone() for name in lists}) for _ in range(count)]


def interleaved(works: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each, in turns, after one turn that does not count."""
    taken: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(rounds + 1):
        for name, work in works.items():
            started = time.perf_counter()
            work()
            if turn:
                taken[name].append(time.perf_counter() - started)
    return taken


def read_bandwidth(rounds: int) -> float:
    """Bytes per second that summing a large tensor reads."""
    large = torch.ones(1 << 26)

    def work() -> None:
        large.sum()

    taken = interleaved({"": work}, rounds)
    return large.nbytes / statistics.median(taken[""])


def kernel_rows(implementations: Sequence[Kernels], effort: Effort, bandwidth: float) -> list[Row]:
    """One delta for all rows of a batch, by shape, density and number of rows; microseconds per call."""
    found: list[Row] = []
    for shape in effort.shapes:
        out, width = shape
        weight = torch.randn(out, width)
        for density in effort.densities:
            first = random_delta(shape, density)
            several = copies(first, max(2, effort.spread_bytes // first.nbytes // 4))
            for rows in effort.rows:
                x, y = torch.randn(rows, width), torch.zeros(rows, out)
                works: dict[str, Callable[[], None]] = {}
                for kernels in implementations:
                    # Decoding to dense takes so long that what caches hold does not matter.
                    used = several[:2] if kernels.name == "reference" else several
                    groups = [[Group(0, rows, ((1.0, delta),))] for delta in used]
                    works[kernels.name] = _all_of(kernels, y, x, groups)
                works["matmul"] = partial(_multiply, y, x, weight)
                counts = {name: 2 if name == "reference" else len(several) for name in works} | {"matmul": 1}
                taken = interleaved(works, effort.rounds)
                times = {n: 1e6 * statistics.median(t) / counts[n] for n, t in taken.items()}
                floor = 1e6 * first.nbytes / bandwidth
                best = min(times[kernels.name] for kernels in implementations)
                found.append(
                    {
                        "out × in": f"{out} × {width}",
                        "density": density,
                        "form": type(first).__name__,
                        "rows": rows,
                        **{f"{name} µs": value for name, value in times.items()},
                        "floor µs": floor,
                        "best / floor": best / floor,
                    }
                )
    return found


def _multiply(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> None:
    y.addmm_(x, weight.T)


def _all_of(kernels: Kernels, y: torch.Tensor, x: torch.Tensor, groups: list[list[Group]]) -> Callable[[], None]:
    def work() -> None:
        for each in groups:
            kernels.add_linear(y, x, each)

    return work


def step_rows(kernels: Kernels, effort: Effort) -> list[Row]:
    """The linear layers of a decode step of 8 rows: the base alone, and with deltas; milliseconds."""
    shapes = LAYER * effort.layers
    weights = [torch.randn(shape) for shape in shapes]
    inputs = {width: torch.randn(EXPERTS, width) for width in (HIDDEN, INTERMEDIATE)}

    def step(groups: list[list[Group]] | None) -> Callable[[], None]:
        def work() -> None:
            for number, (_, width) in enumerate(shapes):
                y = torch.nn.functional.linear(inputs[width], weights[number])
                if groups is not None:
                    kernels.add_linear(y, inputs[width], groups[number])

        return work

    found: list[Row] = []
    for density in (0.012, 0.05, 0.1, 0.2, 0.4):
        templates = {shape: random_delta(shape, density) for shape in dict.fromkeys(shapes)}
        apart, shared = [], []
        for shape in shapes:
            deltas = copies(templates[shape], EXPERTS)
            apart.append([Group(i, i + 1, ((1.0, delta),)) for i, delta in enumerate(deltas)])
            shared.append([Group(0, EXPERTS, ((1.0, deltas[0]),))])
        works = {"base": step(None), "8 experts": step(apart), "1 expert": step(shared)}
        taken = interleaved(works, effort.rounds)
        base = statistics.median(taken["base"])
        for name, times in taken.items():
            ratios = [b / t for b, t in zip(taken["base"], times, strict=True)]
            bytes_read = sum(
                delta.nbytes
                for groups in {"8 experts": apart, "1 expert": shared}.get(name, [])
                for group in groups
                for _, delta in group.terms
            )
            found.append(
                {
                    "density": density,
                    "8 rows on": name,
                    "ms": 1e3 * statistics.median(times),
                    "deltas MB": bytes_read / 1e6,
                    "of base-only speed": base / statistics.median(times),
                    "lowest": min(ratios),
                    "highest": max(ratios),
                }
            )
    return found


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer of everything; under a minute")
    parser.add_argument("--cache-dir", type=Path, default=ROOT / ".cache", help="where compiled kernels are kept")
    parser.add_argument("--no-write", action="store_true", help="print only")
    arguments = parser.parse_args()
    effort = QUICK if arguments.quick else FULL
    names = [name for name, why in available(CPU, arguments.cache_dir).items() if why is None]
    implementations = [backend(name, CPU, arguments.cache_dir) for name in names if name != "triton"]
    bandwidth = read_bandwidth(effort.rounds)
    print(f"{torch.get_num_threads()} threads; memory is read at {bandwidth / 1e9:.1f} GB/s")
    steps = step_rows(implementations[0], effort)
    show(steps, title=f"linear layers of a decode step, {implementations[0].name} kernels")
    kernels = kernel_rows(implementations, effort, bandwidth)
    show(kernels, title="one delta for all rows")
    if not arguments.no_write:
        shared = {"threads": torch.get_num_threads(), "read GB/s": bandwidth / 1e9}
        write("kernels", f"python -m bench.kernels {' '.join(sys.argv[1:])}".strip(), [shared, *steps, *kernels], [])


if __name__ == "__main__":
    main()
