"""How fast does the engine serve, and what do experts cost it?

`python -m bench.serving --base FOLDER` measures, in turns within one run: decoding the base alone, and a long prompt,
against transformers' own `generate` with a static batch of the same size and dtype; 8 sequences on 8 experts, or all on
one, mixed and merged, against the base alone; how long an expert that lies on disk keeps its first request waiting, and
what that costs the streams that run (`bench.serving_cold`); and, through whole servers side by side, what experts cost
that are registered and not asked for (`bench.serving_registered`). `--quick` makes fewer of everything, and writes
nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from bench.report import Bar, Row, bar, show, write
from bench.serving_cold import cold_rows
from bench.serving_registered import registered_rows
from bench.serving_stock import Stock, stock
from bench.serving_turns import PROMPT, Work, compared, in_turns, streams
from examples.fetch import CACHE
from server.engine.engine import TransformersEngine
from server.engine.options import EngineSettings, Mode
from store.mix import BASE_MIX

EXPERTS = 8
FLEX = 0.012
"""Density of what FlexSwitch makes of 106 million weights: 1.3 million nonzeros."""
COLD = 0.2


@dataclass(frozen=True)
class Effort:
    """How much of everything."""

    tokens: int
    rounds: int
    batches: tuple[int, ...]
    prompt: int
    densities: tuple[float, ...]
    registered: tuple[int, ...]
    blocks: int
    arrivals: int


FULL = Effort(32, 7, (1, 8, 32), 1500, (FLEX, 0.08, 0.2, 0.4), (10, 100, 1000), blocks=5, arrivals=8)
QUICK = Effort(6, 2, (1, 8), 200, (FLEX, COLD), (10, 20), blocks=1, arrivals=2)


def generate(model: torch.nn.Module, prompt: list[int], batch: int, tokens: int, threads: int) -> Work:
    """transformers' own loop over a static batch."""
    ids = torch.tensor([prompt] * batch)

    async def work() -> int:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        with torch.inference_mode():
            made = model.generate(  # type: ignore[operator]
                ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=tokens, max_new_tokens=tokens
            )
        torch.set_num_threads(before)
        return int(made[:, ids.shape[1] :].numel())

    return work


@asynccontextmanager
async def running(arguments: argparse.Namespace, mode: Mode, stored: Stock) -> AsyncIterator[TransformersEngine]:
    """An engine that reads its experts from the stock."""
    settings = EngineSettings(
        dtype=arguments.dtype, mode=mode, threads=arguments.threads, kv_bytes=256 << 20, expert_bytes=8 << 30,
        prefix_cache=False,
    )  # fmt: skip
    engine = TransformersEngine(
        arguments.base, name="base", settings=settings, read_expert=stored.store.read, cache_dir=CACHE.parent
    )
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


async def base_rows(
    engine: TransformersEngine, arguments: argparse.Namespace, effort: Effort
) -> tuple[list[dict[str, Any]], list[Bar]]:
    """The base alone against transformers, which gets each number of threads and is judged by its best."""
    rows, bars = [], []
    plain = AutoModelForCausalLM.from_pretrained(arguments.base, dtype=getattr(torch, arguments.dtype))  # in eval mode
    prompt = engine.tokenizer.encode(PROMPT)
    for batch in effort.batches:
        ours = f"base, {batch} sequences"
        theirs = {n: f"generate, batch of {batch}, {n} threads" for n in (1, torch.get_num_threads())}
        works: dict[str, Work] = {ours: partial(streams, engine, [BASE_MIX] * batch, effort.tokens)}
        works |= {what: generate(plain, prompt, batch, effort.tokens, n) for n, what in theirs.items()}
        speeds = await in_turns(works, effort.rounds)
        found = [compared(ours, what, speeds) for what in theirs.values()]
        least = min(row["ratio"] for row in found)
        bars.append(bar(f"engine.base.{batch}", f"{ours}: × transformers' generate", least, ">=", 1.5))
        rows += found
    long = (prompt * effort.prompt)[: effort.prompt]
    ours = f"base, a prompt of {effort.prompt} tokens"
    theirs = {n: f"generate of one token, {n} threads" for n in (1, torch.get_num_threads())}

    def read(work: Work) -> Work:
        async def reads() -> int:
            await work()
            return len(long)

        return reads

    works = {ours: read(partial(streams, engine, [BASE_MIX], 1, long))}
    works |= {what: read(generate(plain, long, 1, 1, n)) for n, what in theirs.items()}
    speeds = await in_turns(works, effort.rounds)
    return rows + [compared(ours, what, speeds) for what in theirs.values()], bars


async def expert_rows(
    mixed: TransformersEngine, merged: TransformersEngine, stored: Stock, effort: Effort
) -> tuple[list[dict[str, Any]], list[Bar]]:
    """Eight sequences on experts against as many on the base."""
    alone, said = f"base, {EXPERTS} sequences", f"{EXPERTS} sequences, × the base alone:"
    rows: list[dict[str, Any]] = []
    for density in effort.densities:
        apart = stored.mixes(density)
        cases = {
            f"{EXPERTS} experts, mixed": (mixed, apart),
            "1 expert, mixed": (mixed, apart[:1] * EXPERTS),
            "1 expert, merged": (merged, apart[:1] * EXPERTS),
        }
        works: dict[str, Work] = {alone: partial(streams, mixed, [BASE_MIX] * EXPERTS, effort.tokens)}
        works |= {what: partial(streams, engine, mixes, effort.tokens) for what, (engine, mixes) in cases.items()}
        speeds = await in_turns(works, effort.rounds)
        rows += [{**compared(what, alone, speeds), "density": density} for what in cases]

    def least(what: str, low: float, high: float) -> float:
        ratios: list[float] = [row["ratio"] for row in rows if row["what"] == what and low <= row["density"] <= high]
        return min(ratios)

    eight = f"{EXPERTS} experts, mixed"
    return rows, [
        bar("engine.apart.flex", f"{said} on 8 of density {FLEX}", least(eight, 0, FLEX), ">=", 0.9),
        bar("engine.apart.dense", f"{said} on 8 of 0.2 to 0.4", least(eight, 0.2, 0.4), ">=", 0.6),
        bar("engine.shared.merged", f"{said} all on one, merged", least("1 expert, merged", 0, 1), ">=", 0.95),
        bar("engine.shared.mixed", f"{said} all on one, mixed", least("1 expert, mixed", 0, 1), ">=", 0.85),
    ]


async def run(arguments: argparse.Namespace, effort: Effort) -> tuple[list[Row], list[Row], list[Bar]]:
    """The rows of comparisons, those about cold experts, and all bars."""
    with TemporaryDirectory() as folder:
        stored = stock(arguments.base, Path(folder), effort.densities, EXPERTS)
        async with running(arguments, Mode.MIXED, stored) as mixed:
            rows, bars = await base_rows(mixed, arguments, effort)
            async with running(arguments, Mode.MERGED, stored) as merged:
                beside, more = await expert_rows(mixed, merged, stored, effort)
            cold, further = await cold_rows(mixed, stored, COLD, rounds=effort.blocks, arrivals=effort.arrivals)
        among, last = await registered_rows(
            arguments, stored, COLD, effort.registered, threads=arguments.threads, tokens=effort.tokens,
            rounds=3 * effort.rounds,  # differences of a few hundredths are to be seen
        )  # fmt: skip
    return [*rows, *beside, *among], cold, [*bars, *more, *further, *last]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.serving", description=__doc__)
    parser.add_argument("--base", type=Path, required=True, help="base folder (safetensors)")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the engine (default: torch's)")
    parser.add_argument("--quick", action="store_true", help="fewer of everything, nothing written")
    arguments = parser.parse_args()
    rows, cold, bars = asyncio.run(run(arguments, QUICK if arguments.quick else FULL))
    show(rows, title=f"tokens per second, {arguments.dtype}, {arguments.threads} threads")
    show(cold, bars, title=f"an expert of density {COLD} from disk")
    if not arguments.quick:
        threads = {"threads": arguments.threads, "dtype": arguments.dtype}
        write("serving", "python -m bench.serving " + " ".join(sys.argv[1:]), [threads, *rows, *cold], bars)


if __name__ == "__main__":
    main()
