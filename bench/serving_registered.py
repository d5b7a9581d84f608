"""What do experts cost that are registered and not asked for?

Servers that differ in nothing else stand side by side and are asked over HTTP in turns: for eight experts, the same in
each, and for the base alone.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from shutil import copyfile
from tempfile import TemporaryDirectory

import httpx

from bench.report import Bar, Row, bar
from bench.served import serving
from bench.serving_stock import Stock, random_tensors
from bench.serving_turns import PROMPT, compared, in_turns
from examples.fetch import CACHE
from store.expert_file import ExpertInfo, write_expert
from store.fingerprint import manifest_of

FILLER = ".layers.0.self_attn.k_proj."
"""The one matrix that experts move which nobody asks for."""
_STEADY = 5
"""Times as many rounds for the base alone: single ratios scatter by 8 %, and 2 % is to be told apart from nothing."""


def write_experts(base: Path, folder: Path, stored: Stock, density: float, count: int) -> None:
    """Expert files: those of the stock, and as many small ones as make `count`."""
    for digest in stored.digests[density]:
        copyfile(stored.path(digest), folder / f"{digest}.safetensors")
    manifest = manifest_of(base, CACHE.parent)
    tensors = random_tensors(manifest, 0.02, only=FILLER)
    for number in range(count - len(stored.digests[density])):
        info = ExpertInfo(codec="t-switch", tool="bench.serving", name=f"idle{number}")
        write_expert(folder / f"idle{number}.safetensors", info, tensors, manifest)


async def asked(url: str, models: list[str], tokens: int) -> int:
    """One greedy completion of each model, all together."""
    async with httpx.AsyncClient(base_url=url, timeout=600) as http:

        async def one(model: str) -> int:
            body = {"model": model, "prompt": PROMPT, "temperature": 0, "max_tokens": tokens, "ignore_eos": True}
            answer = await http.post("/v1/completions", json=body)
            return int(answer.raise_for_status().json()["usage"]["completion_tokens"])

        return sum(await asyncio.gather(*map(one, models)))


@contextmanager
def servers(
    arguments: argparse.Namespace, stored: Stock, density: float, counts: tuple[int, ...], threads: int
) -> Iterator[dict[int, str]]:
    """Servers by how many experts they have."""
    with ExitStack() as stack:
        urls = {}
        for count in counts:
            experts, data = (Path(stack.enter_context(TemporaryDirectory())) for _ in range(2))
            if count:
                write_experts(arguments.base, experts, stored, density, count)
            options = ("--base", arguments.base, "--base-name", "base", "--experts", experts, "--data-dir", data)
            how = ("--dtype", arguments.dtype, "--mode", "mixed", "--threads", threads, "--kv-bytes", "128MiB")
            urls[count] = stack.enter_context(serving(*options, *map(str, how), "--cache-dir", CACHE.parent))
        yield urls


async def registered_rows(
    arguments: argparse.Namespace,
    stored: Stock,
    density: float,
    counts: tuple[int, ...],
    *,
    threads: int,
    tokens: int,
    rounds: int,
) -> tuple[list[Row], list[Bar]]:
    """Eight hot experts among `counts` registered ones, and the base beside none and beside the second of `counts`.

    Args:
        threads: of every server, so that no two choose differently.
    """
    hot = stored.names(density)
    with servers(arguments, stored, density, (0, *counts), threads) as urls:
        works = {f"{len(hot)} hot of {n} experts": partial(asked, urls[n], hot, tokens) for n in counts}
        speeds = await in_turns(works, rounds)
        first, *others = speeds
        rows = [compared(name, first, speeds) for name in others]
        some = counts[1]
        beside = {n: f"base, {len(hot)} sequences beside {n} experts" for n in (0, some)}
        works = {what: partial(asked, urls[n], ["base"] * len(hot), tokens) for n, what in beside.items()}
        rows.append(compared(beside[some], beside[0], await in_turns(works, _STEADY * rounds)))
    *flat, alone = (row["ratio"] for row in rows)
    differs = max(abs(ratio - 1) for ratio in flat)
    return list(rows), [
        bar("engine.flat", f"{len(hot)} hot experts of {counts}: throughput differs by", differs, "<=", 0.05),
        bar("engine.registered", f"{some} registered experts cost the base's throughput", 1 - alone, "<=", 0.02),
    ]
