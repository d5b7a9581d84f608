"""Does `--mode auto` choose rightly?

`python -m bench.modes --base FOLDER` runs the same requests through three engines in turns, one merging, one applying
beside, one choosing, and compares the last with the better of the others: single answers, short and long, on one expert
or on another each time; many streams on one expert, or on one each. Experts are random, of the densities of FlexSwitch
and T-Switch. `--quick` makes fewer of everything, and writes nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from bench.report import Bar, Row, bar, show, write
from bench.serving import running
from bench.serving_stock import Stock, stock
from bench.serving_turns import Work, in_turns, streams
from server.engine.engine import TransformersEngine
from server.engine.options import Mode
from store.mix import Mix

EXPERTS = 8
DENSITIES = (0.012, 0.08, 0.4)
GOAL = 0.9
"""Of the better mode's throughput: what a choice may cost that is right on the whole."""


async def one_after_another(engine: TransformersEngine, mixes: Sequence[Mix], tokens: int) -> int:
    """Single streams, each begun when the one before has ended."""
    return sum([await streams(engine, [mix], tokens) for mix in mixes])


def cases(mixes: list[Mix], engine: TransformersEngine, long: int) -> dict[str, Work]:
    """What an engine is asked for."""
    apart = partial(one_after_another, engine, mixes[:4])
    return {
        "4 answers of 4 tokens, an expert each": partial(apart, 4),
        f"4 answers of {long} tokens, an expert each": partial(apart, long),
        f"4 answers of {long} tokens, one expert": partial(one_after_another, engine, mixes[:1] * 4, long),
        "8 streams of one expert": partial(streams, engine, mixes[:1] * EXPERTS, long),
        "8 streams of 2 experts": partial(streams, engine, sorted(mixes[:2] * 4, key=mixes.index), long),
        "8 streams of 8 experts": partial(streams, engine, mixes, long),
    }


async def measured(arguments: argparse.Namespace, stored: Stock, rounds: int, long: int) -> tuple[list[Row], list[Bar]]:
    """A row per density and case."""
    rows: list[Row] = []
    ratios: list[float] = []
    modes = (Mode.MERGED, Mode.MIXED, Mode.AUTO)
    async with AsyncExitStack() as engines:
        known = {mode: await engines.enter_async_context(running(arguments, mode, stored)) for mode in modes}
        for density in stored.digests:
            asked = {mode: cases(stored.mixes(density), engine, long) for mode, engine in known.items()}
            for what in asked[Mode.AUTO]:
                works = {str(mode): asked[mode][what] for mode in modes}
                speeds = await in_turns(works, rounds)
                medians = {f"{mode}, tok/s": statistics.median(speeds[str(mode)]) for mode in modes}
                better = max("merged", "mixed", key=lambda mode: medians[f"{mode}, tok/s"])
                ratio = statistics.median(a / b for a, b in zip(speeds["auto"], speeds[better], strict=True))
                ratios.append(ratio)
                rows.append({"density": density, "what": what, **medians, "auto / the better": ratio})
    what = "--mode auto: its throughput in that of the better mode, the worst of all cases"
    return rows, [bar("engine.auto", what, min(ratios), ">=", GOAL)]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.modes", description=__doc__)
    parser.add_argument("--base", type=Path, required=True, help="base folder (safetensors)")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of each engine")
    parser.add_argument("--quick", action="store_true", help="fewer of everything, nothing written")
    arguments = parser.parse_args()
    with TemporaryDirectory() as folder:
        stored = stock(arguments.base, Path(folder), DENSITIES[:1] if arguments.quick else DENSITIES, EXPERTS)
        rounds, long = (1, 8) if arguments.quick else (5, 64)
        rows, bars = asyncio.run(measured(arguments, stored, rounds, long))
    show(rows, bars, title=f"{arguments.dtype}, {arguments.threads} threads")
    if not arguments.quick:
        made: Row = {"threads": arguments.threads, "dtype": arguments.dtype}
        write("modes", "python -m bench.modes " + " ".join(sys.argv[1:]), [made, *rows], bars)


if __name__ == "__main__":
    main()
