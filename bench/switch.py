"""What does it cost to go from one expert to another in merged mode?

`python -m bench.switch --base FOLDER` loads the base, folds experts into all their weights in turns, restore included
(the weights of one expert are made from the pristine ones, not from another's), and beside each switch makes one dense
copy of the same weights: read once, written once. Experts of every density are random deltas in all matrices of the
decoder's layers, alone or mixed in halves; the demo's experts are as they are. `--quick` takes fewer of everything, and
writes nothing.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from bench.kernels import random_delta
from bench.report import Row, bar, show, write
from examples.compress import EXPERTS
from examples.fetch import CACHE
from server.engine.expert import DecodedExpert
from server.engine.host_tier import HostTier
from server.engine.kernels import Kernels, available, backend
from server.engine.loader import ExpertLoader
from server.engine.merged import MergedWeights
from server.engine.model import BaseModel
from store.expert_file import digest_of
from store.mix import BASE_MIX, Mix

CPU = torch.device("cpu")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
DENSITIES = (0.012, 0.08, 0.2, 0.4)
MIXED = (0.012, 0.08, 0.4)
"""Densities of experts that are mixed in halves."""
LEVELS = 13
"""What the levels of experts with several digits reach."""
GOAL = 2.0
"""Dense copies that a switch may take."""


Pair = Sequence[Sequence[DecodedExpert]]
"""The experts of two mixes."""


def random_expert(model: BaseModel, own: Kernels, density: float, seed: int, top: int = 1) -> DecodedExpert:
    """One that moves every matrix of the decoder's layers, as these kernels read it fastest."""
    shapes = {name: p.shape for name, p in model.parameters.items() if p.ndim == 2 and ".layers." in name}
    deltas = {
        name: random_delta((shape[0], shape[1]), density, seed + place, top, own.lanes, own.lists_below)
        for place, (name, shape) in enumerate(shapes.items())
    }
    return DecodedExpert(f"random-{density}-{top}-{seed}", deltas)


def demo_experts(model: BaseModel, own: Kernels, folder: Path) -> list[DecodedExpert]:
    """Two of the demo's experts, decoded as the engine does it."""
    files = {digest_of(path): path for path in sorted(folder.glob("*.safetensors"))[:2]}
    if len(files) < 2:
        raise SystemExit(f"{folder} has no two expert files: give a folder that has as --experts")
    loader = ExpertLoader(
        model.manifest,
        CPU,
        lambda digest: files[digest].read_bytes(),
        HostTier(0),
        transcode=own.transcode,
        lists_below=own.lists_below,
        lanes=own.lanes,
    )
    return [loader.load(digest) for digest in files]


def switches(model: BaseModel, kernels: Mapping[str, Kernels], pair: Pair, rounds: int) -> dict[str, list[float]]:
    """Seconds of each switch and of each copy, in turns."""
    experts = {expert.digest: expert for mixed in pair for expert in mixed}
    names = list(dict.fromkeys(name for expert in experts.values() for name in expert.tensors))
    pristine = [model.parameters[name].data for name in names]
    copies = [torch.empty_like(tensor) for tensor in pristine]
    holders = {name: MergedWeights(model.parameters, kernel) for name, kernel in kernels.items()}

    def copy() -> None:
        for into, tensor in zip(copies, pristine, strict=True):
            into.copy_(tensor)

    def switch(holder: MergedWeights, mix: Mix) -> None:
        holder.apply(mix, experts)

    taken: dict[str, list[float]] = {name: [] for name in ("copy", *holders)}
    for turn in range(rounds + 2):  # the first turn of each expert makes buffers
        mixed = pair[turn % 2]
        mix = Mix.of({expert.digest: 1.0 / len(mixed) for expert in mixed})
        works: dict[str, Callable[[], None]] = {"copy": copy}
        works |= {name: partial(switch, holder, mix) for name, holder in holders.items()}
        for name, work in works.items():
            began = time.perf_counter()
            work()
            seconds = time.perf_counter() - began
            if name != "copy":
                holders[name].apply(BASE_MIX, {})  # or the next copy would be of merged weights; costs no time
            if turn >= 2:
                taken[name].append(seconds)
    return taken


def _pairs(model: BaseModel, own: Kernels, folder: Path, *, quick: bool) -> Iterator[tuple[str, Pair]]:
    """What is switched between, one after the other, so that not all are in memory at a time."""
    yield "demo", [[expert] for expert in demo_experts(model, own, folder)]
    for density in (0.08, 0.4) if quick else DENSITIES:
        yield f"density {density}", [[random_expert(model, own, density, seed)] for seed in (0, 1000)]
    for density in (0.08,) if quick else MIXED:
        experts = [random_expert(model, own, density, seed) for seed in (0, 1000, 2000)]
        yield f"two of density {density}", [experts[:2], experts[1:]]
    for density in (0.012, 0.4):
        some = [random_expert(model, own, density, seed, LEVELS) for seed in (0, 1000)]
        yield f"density {density}, levels to {LEVELS}", [[expert] for expert in some]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.switch", description=__doc__)
    parser.add_argument("--base", type=Path, required=True, help="base folder (safetensors)")
    parser.add_argument("--experts", type=Path, default=EXPERTS, help="folder of expert files (default: the demo's)")
    parser.add_argument("--quick", action="store_true", help="fewer of everything, nothing written")
    arguments = parser.parse_args()
    names = [name for name, why in available(CPU, CACHE.parent).items() if why is None and name != "triton"]
    kernels = {name: backend(name, CPU, CACHE.parent) for name in names}
    rows: list[Row] = []
    worst = 0.0
    for dtype in ["bfloat16"] if arguments.quick else DTYPES:
        model = BaseModel(arguments.base, dtype=DTYPES[dtype], device=CPU, feature_layer=1, cache_dir=CACHE.parent)
        for kernel in kernels.values():
            kernel.prepare(DTYPES[dtype], CPU)
        for what, pair in _pairs(model, kernels[names[0]], arguments.experts, quick=arguments.quick):
            taken = switches(model, kernels, pair, 4 if arguments.quick else 15)
            names_moved = {name for expert in pair[0] for name in expert.tensors}
            patched = sum(model.parameters[name].nbytes for name in names_moved)
            for name in names:
                ratios = [one / copy for one, copy in zip(taken[name], taken["copy"], strict=True)]
                rows.append(
                    {"weights": dtype, "expert": what, "kernels": name, "patched MB": patched / 1e6,
                     "copy ms": 1e3 * statistics.median(taken["copy"]),
                     "switch ms": 1e3 * statistics.median(taken[name]),
                     "copies": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}
                )  # fmt: skip
                if name == names[0]:
                    worst = max(worst, statistics.median(ratios))
    bars = [
        bar(
            "engine.switch", "switch of all layers in merged mode, in dense copies, the worst of all", worst, "<=", GOAL
        )
    ]
    show(rows, bars, title=f"{torch.get_num_threads()} threads")
    if not arguments.quick:
        threads = {"threads": torch.get_num_threads()}
        write("switch", "python -m bench.switch " + " ".join(sys.argv[1:]), [threads, *rows], bars)


if __name__ == "__main__":
    main()
