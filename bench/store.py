"""How many experts a store carries: `python -m bench.store`.

Start-up, memory, listing and looking up with 10,000 registered experts, on disk. Names share one blob: what is measured
is the catalogue, and its records are as large as real ones. Routing profiles are the router's own and are not counted.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import httpx

from bench import report
from server.app import create_app
from server.settings import Settings
from store.backends.disk import DiskStore
from store.card import Card
from store.expert_file import write_expert
from store.expert_info import ExpertInfo
from store.manifest import BaseManifest
from store.packed import PackedDense
from store.registry import Registry

BASE = BaseManifest("0" * 64, {"norm": (4,)})
PAGE = 100
REPEATS = 7


def fill(root: Path, experts: int) -> None:
    """Make a store of so many names; records are written as the registry writes them, but not flushed one by one."""
    store = DiskStore(root)
    registry = Registry(store, BASE, frozenset())
    path = store.quarantine() / "upload"
    exemplars = tuple(f"exemplar number {i} of a task" for i in range(20))
    card = Card("Ada Lovelace", "Apache-2.0", ("language:en", "tools"), ("a" * 64,), {"retention": "0.97"})
    said = "an expert for " + "x" * 100
    info = ExpertInfo(codec="t-switch", tool="bench", description=said, exemplars=exemplars, card=card)
    write_expert(path, info, {"norm": PackedDense((4,), bytes(8))}, BASE)
    registry.publish(path, name="model")
    record = root / "records" / "model.json"
    text = record.read_text()
    for i in range(experts - 1):
        name = f"expert-{i:06d}"
        (record.parent / f"{name}.json").write_text(text.replace('"name": "model"', f'"name": "{name}"'))
    store.close()


def opened(root: Path) -> tuple[float, float, int]:
    """Seconds to open a store, bytes of memory that takes, and how many experts it has. For a process of its own."""
    gc.collect()
    before, began = resident(), time.perf_counter()
    registry = Registry(DiskStore(root), BASE, frozenset())
    count = len(registry.list())  # the first look reads all records
    seconds = time.perf_counter() - began
    gc.collect()
    return seconds, resident() - before, count


def resident() -> int:
    """Bytes of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def open_apart(root: Path) -> tuple[float, float, int]:
    """`opened` in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.store", "--open", str(root)], capture_output=True, text=True, check=True
    )
    seconds, memory, count = done.stdout.split()
    return float(seconds), float(memory), int(count)


def per_call(call: Callable[[], object], calls: int) -> float:
    """Seconds of one call: the median of several runs."""
    runs = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        for _ in range(calls):
            call()
        runs.append((time.perf_counter() - began) / calls)
    return statistics.median(runs)


async def page_seconds(registry: Registry) -> tuple[float, float]:
    """Seconds of one page over HTTP, the application's part of it.

    Returns:
        From the middle of the list; and of a search that looks at all experts and finds none.
    """
    settings = Settings.model_validate({"base": "base", "host": "127.0.0.1"})
    engine = Mock()
    engine.base.name = "base"
    engine.tokenizer.chat_template = ""
    ledger = Mock(documents=Mock(return_value={}))
    app = create_app(
        settings,
        engine=engine,
        registry=registry,
        ledger=ledger,
        router=Mock(),
        quarantine=Path(),
        check=Mock(),
        base_folder=Path(),
    )
    medians = []
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as http:
        for query, found in (({"after": "expert-000100"}, PAGE), ({"q": "nothing like it", "tag": "tools"}, 0)):
            runs = []
            for _ in range(REPEATS + 1):
                began = time.perf_counter()
                answer = await http.get("/v1/experts", params={"limit": PAGE, **query})
                runs.append(time.perf_counter() - began)
                assert len(answer.json()["data"]) == found, answer.text
            medians.append(statistics.median(runs[1:]))
    return medians[0], medians[1]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.store", description=__doc__)
    parser.add_argument("--experts", type=int, default=10_000)
    parser.add_argument("--quick", action="store_true", help="500 experts; writes no results")
    parser.add_argument("--open", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.open is not None:
        print(*opened(given.open))
        return
    experts = 500 if given.quick else given.experts
    with tempfile.TemporaryDirectory(prefix="bench-store-") as folder:
        root = Path(folder) / "store"
        fill(root, experts)
        starts = [open_apart(root) for _ in range(5)]
        assert all(count == experts for _, _, count in starts)
        store = DiskStore(root)
        registry = Registry(store, BASE, frozenset())
        lookup = per_call(lambda: registry.get("expert-000250"), 2000)
        page, search = asyncio.run(page_seconds(registry))
        store.close()
    start = statistics.median(seconds for seconds, _, _ in starts)
    memory = statistics.median(size for _, size, _ in starts) / experts
    rows = [
        {
            "experts": experts,
            "start_s": start,
            "start_s_worst": max(seconds for seconds, _, _ in starts),
            "memory_kb_per_expert": memory / 1e3,
            "page_ms": 1e3 * page,
            "search_ms": 1e3 * search,
            "lookup_us": 1e6 * lookup,
        }
    ]
    bars = [
        report.bar("store.start", f"opening a store of {experts:,} experts (s)", start, "<=", 10),
        report.bar("store.memory", "idle memory per registered expert (kB)", memory / 1e3, "<=", 20),
        report.bar("store.page", f"GET /v1/experts, a page of {PAGE} (ms)", 1e3 * page, "<=", 50),
        report.bar("store.search", "GET /v1/experts, a search that finds nothing (ms)", 1e3 * search, "<=", 50),
        report.bar("store.lookup", "looking up an expert by name (µs)", 1e6 * lookup, "<=", 50),
    ]
    report.show(rows, bars)
    if not given.quick:
        report.write("store", shlex.join(["python", "-m", "bench.store", *sys.argv[1:]]), rows, bars)


if __name__ == "__main__":
    main()
