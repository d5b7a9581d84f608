"""Whole decode steps of the base and of rows with experts, the switch in merged mode, and what presence costs.

All times are the wall clock's, of several calls from one synchronisation to the next: what the host takes is in them.
"""

from __future__ import annotations

import statistics
from functools import partial

import torch

from bench.gpu_bench import Bench, weights_of
from bench.gpu_lab import Work, median_ms
from bench.gpu_world import experts_of, matrices, parcel, weight_bytes
from bench.report import Bar, Row, bar
from server.engine.expert import DecodedExpert
from server.engine.merged import MergedWeights
from server.engine.parcel import Checksum, checksum
from store.mix import BASE_MIX, Mix

_GIB = 1 << 30
_FEW_BITS = 0.1
"""A density whose nonzeros are planes."""


def mix_of(expert: DecodedExpert) -> Mix:
    return Mix.of({expert.digest: 1.0})


def decode(bench: Bench) -> tuple[list[Row], list[Bar]]:
    """Decode steps of 1, 8 and 32 rows, on one expert and on as many as there are rows, by density."""
    rows: list[Row] = []
    bars: list[Bar] = []
    for density in bench.lab.effort.densities:
        template = parcel(bench.model, density)
        room = _room(bench, template.nbytes)
        experts = list(experts_of(template, min(32, room), bench.lab.device))
        bench.experts = {expert.digest: expert for expert in experts}
        del template
        for count, used in ((1, 1), (8, 1), (8, 8), (32, 1), (32, 32)):
            if used > len(experts):
                rows.append({"what": "decode", "rows": count, "experts": used, "density": density,
                             "note": f"only {len(experts)} fit the memory"})  # fmt: skip
                continue
            measured = _against_base(bench, count, experts[:used])
            rows.append({"what": "decode", "rows": count, "experts": used, "density": density, **measured})
            bars += _decode_bars(count, used, density, measured)
        bench.experts = {}
        bench.executor.mixed.forget()
        experts.clear()
        bench.lab.free()
    return rows, bars


def graphs(bench: Bench) -> tuple[list[Row], list[Bar]]:
    """Steps of the base and of rows with experts kernel by kernel, next to those as one CUDA graph; and what the first
    step of another batch costs, whose tables are made anew. Without a GPU nothing is captured, and the rows say so."""
    form = "a CUDA graph" if bench.lab.on_gpu else "fixed tensors, not captured"
    template = parcel(bench.model, _FEW_BITS)
    experts = list(experts_of(template, 8, bench.lab.device))
    bench.experts = {expert.digest: expert for expert in experts}
    del template
    rows: list[Row] = []
    for count, used in ((1, 0), (8, 0), (32, 0), (1, 1), (8, 8), (32, 1)):
        mixes = [mix_of(experts[row % used]) if used else BASE_MIX for row in range(count)]
        batch, other = bench.batch(mixes), bench.batch([*mixes[1:], mixes[-1]])
        step, calls = bench.step(batch), bench.lab.effort.calls
        works: dict[str, list[Work]] = {"plain": [bench.kernel_by_kernel(step)] * calls, "fixed": [step] * calls}
        taken = bench.lab.wall_seconds(works)
        changed = bench.lab.wall_seconds({"": [bench.step(other), step]})[""] if used > 1 else []
        bench.end(batch)
        bench.end(other)
        seconds = {name: statistics.median(times) for name, times in taken.items()}
        rows.append({"what": "steps", "rows": count, "experts": used, "density": _FEW_BITS if used else None,
                     "form": form, "ms kernel by kernel": median_ms(taken["plain"]), "ms": median_ms(taken["fixed"]),
                     "floor ms": 1e3 * bench.step_floor(count, experts[:used]),
                     "× kernel by kernel": seconds["fixed"] / seconds["plain"],
                     "ms of a batch's first step": median_ms(changed) if changed else None})  # fmt: skip
    bench.experts = {}
    return rows, []


def _against_base(bench: Bench, count: int, experts: list[DecodedExpert]) -> dict[str, float]:
    """A step of so many rows on those experts, in turns with one of the base alone."""
    base = bench.batch([BASE_MIX] * count)
    mixed = bench.batch([mix_of(experts[row % len(experts)]) for row in range(count)])
    steps = {"base": bench.captured(bench.step(base)), "mixed": bench.step(mixed)}
    if bench.kernels.name == "triton":
        bench.captured(steps["mixed"])
    works = {name: [step] * bench.lab.effort.calls for name, step in steps.items()}
    taken = bench.lab.wall_seconds(works)
    bench.end(base)
    bench.end(mixed)
    seconds = {name: statistics.median(times) for name, times in taken.items()}
    floor = bench.step_floor(count, experts)
    return {
        "bits/weight": 8 * sum(expert.nbytes for expert in experts) / weights_of(experts),
        "base ms": median_ms(taken["base"]),
        "base floor ms": 1e3 * bench.step_floor(count),
        "ms": median_ms(taken["mixed"]),
        "floor ms": 1e3 * floor,
        "× floor": seconds["mixed"] / floor,
        "× base": seconds["mixed"] / seconds["base"],
        "tokens/s": count / seconds["mixed"],
    }


def _decode_bars(rows: int, experts: int, density: float, measured: dict[str, float]) -> list[Bar]:
    name, times = f"at density {density} ({measured['bits/weight']:.2f} bits/weight)", measured["× base"]
    if (rows, experts) == (32, 1):
        what = f"decode step of 32 rows on one expert {name}: what it takes more than the base's"
        return [bar(f"gpu.one_expert.{density}", what, times - 1, "<=", 0.10)]
    if (rows, experts) == (8, 8) and 1 <= measured["bits/weight"] <= 2.1:
        what = f"decode step of 8 rows on 8 experts {name}, in the base's steps"
        return [bar(f"gpu.eight_experts.{density}", what, times, "<=", 1.6)]
    if (rows, experts) == (32, 32) and density == 0.012:
        what = f"decode of 32 rows on 32 experts {name}, of the base's throughput"
        return [bar("gpu.thirty_two_sparse", what, 1 / times, ">=", 0.8)]
    if (rows, experts) == (32, 32) and 1 <= measured["bits/weight"] <= 2.1:
        what = f"decode of 32 rows on 32 experts {name}, tokens/s"
        return [bar(f"gpu.thirty_two.{density}", what, measured["tokens/s"], ">=", 1200)]
    return []


def switch(bench: Bench) -> tuple[list[Row], list[Bar]]:
    """All layers to another expert in merged mode, and back to the base, which must be what it was."""
    rows: list[Row] = []
    merged, worst = MergedWeights(bench.model.parameters, bench.kernels), 0.0
    before = _checksums(bench)
    for density in bench.lab.effort.densities:
        pair = list(experts_of(parcel(bench.model, density), 2, bench.lab.device))
        known = {expert.digest: expert for expert in pair}
        to: list[Work] = [partial(merged.apply, mix_of(expert), known) for expert in pair]
        taken = bench.lab.wall_seconds({"to": to})["to"]
        back = bench.lab.wall_seconds({"back": [partial(merged.apply, BASE_MIX, {})]}, 1)["back"]
        floor = bench.lab.floor(2 * weight_bytes(bench.model, matrices(bench.model)) + pair[0].nbytes)
        worst = max(worst, statistics.median(taken) / floor)
        rows.append({"what": "switch", "density": density, "ms": median_ms(taken), "floor ms": 1e3 * floor,
                     "× floor": statistics.median(taken) / floor, "back to the base ms": median_ms(back)})  # fmt: skip
        del to, pair, known
        bench.lab.free()
    if _checksums(bench) != before:
        raise AssertionError("after switching back the base's weights are not what they were")
    what = "switch of all layers to another expert, restore included, in floors, the worst of all densities"
    return rows, [bar("gpu.switch", what, worst, "<=", 1.5)]


def _checksums(bench: Bench) -> dict[str, Checksum]:
    """Of the weights that the model runs with now."""
    return {name: checksum(p.data.view(-1).view(torch.uint8)) for name, p in bench.model.parameters.items()}


def registered(bench: Bench) -> tuple[list[Row], list[Bar]]:
    """Steps of the base alone, before experts are on the device and while they are."""
    count = bench.lab.effort.registered
    batch = bench.batch([BASE_MIX] * 32)
    alone = bench.lab.wall_seconds({"base": [bench.step(batch, {})] * bench.lab.effort.calls})["base"]
    density = bench.lab.effort.densities[0]
    bench.experts = {e.digest: e for e in experts_of(parcel(bench.model, density), count, bench.lab.device)}
    among = bench.lab.wall_seconds({"base": [bench.step(batch)] * bench.lab.effort.calls})["base"]
    bench.experts = {}
    bench.lab.free()
    again = bench.lab.wall_seconds({"base": [bench.step(batch, {})] * bench.lab.effort.calls})["base"]
    bench.end(batch)
    more = 2 * statistics.median(among) / (statistics.median(alone) + statistics.median(again)) - 1
    row: Row = {"what": "base, 32 rows", "experts registered": count, "ms": median_ms(among),
                "ms before": median_ms(alone), "ms after": median_ms(again), "more": more}  # fmt: skip
    what = f"decode step of the base with {count} experts on the device: what it takes more than without"
    return [row], [bar("gpu.registered", what, more, "<=", 0.01)]


def resident(bench: Bench) -> tuple[list[Row], list[Bar]]:
    """How many experts fit beside the base and a cache of 20 GiB: allocated, not calculated, where there is a GPU."""
    rows: list[Row] = []
    bars: list[Bar] = []
    for density in bench.lab.effort.densities:
        template = parcel(bench.model, density)
        bits = 8 * template.nbytes / sum(p[0] * p[1] for p in matrices(bench.model).values())
        count = _allocated(bench, template.nbytes)
        rows.append({"what": "resident", "density": density, "bits/weight": bits, "GB each": template.nbytes / 1e9,
                     "experts": count})  # fmt: skip
        goal = {0.012: 200, 0.1: 40}.get(density)
        if goal is not None:
            what = f"full fine-tunes resident beside a 20 GiB cache at density {density} ({bits:.2f} bits/weight)"
            bars.append(bar(f"gpu.resident.{density}", what, count, ">=", goal))
    return rows, bars


def _allocated(bench: Bench, nbytes: int) -> int:
    if not bench.lab.on_gpu:
        return 0
    bench.lab.free()
    missing = max(0, 20 * _GIB - bench.lab.effort.kv_bytes)
    cache = torch.empty(missing, dtype=torch.uint8, device=bench.lab.device)
    held: list[torch.Tensor] = []
    try:
        while len(held) < 10_000:
            held.append(torch.empty(nbytes, dtype=torch.uint8, device=bench.lab.device))
    except torch.OutOfMemoryError:
        pass
    count = len(held)
    held.clear()
    del cache
    bench.lab.free()
    return count


def _room(bench: Bench, nbytes: int) -> int:
    """How many buffers of that size the device takes now, with 3 GiB left for what steps need."""
    if not bench.lab.on_gpu:
        return 32
    free, _ = torch.cuda.mem_get_info(bench.lab.device)
    return int(max(0, free - 3 * _GIB) // nbytes)
