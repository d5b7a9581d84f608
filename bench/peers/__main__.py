"""Against what a user would pick instead: `python -m bench.peers`.

One trace, the same prompts and lengths for all, is asked of our server and of its peers, each a process of its own with
eight fine-tunes of one base: 64 requests, experts by Zipf's law, 16 at a time, every answer exactly as long as asked
for. Servers take turns within a round, and a ratio is of one round. Against llama.cpp, which has the base in four bits,
ours has it in four bits too; there, also one stream of the base alone, and eight streams on eight experts. What cannot
run here, or fails on the way, is left out, and the table says why. `--prepare` downloads, builds and converts, and
measures nothing; `--quick` goes through everything with a few requests, and writes nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from pathlib import Path

from bench.peers.adapters import write_adapter
from bench.peers.install import INSTALLED, environment, llama_adapter, llama_server
from bench.peers.measure import FULL, QUICK, Effort, measure
from bench.peers.replay import Peer
from bench.peers.servers import PeerError, Subject, llama, ours, peft, transformers_serve
from bench.report import RESULTS, Bar, Row, show, write
from examples.base import packaged_gguf
from examples.build import load_rows
from examples.compress import EXPERTS, expert_file
from examples.tasks import TASKS
from server.engine.options import BaseWeights

SHIPPED = Path(__file__).parents[2] / "examples" / "experts"
"""The experts that come with the project; the others are where `examples.compress` leaves them."""
RANK = 16
HOLD_BACK = {"OMP_NUM_THREADS", "OMP_WAIT_POLICY"}
"""Variables that change what the peers' libraries choose by themselves."""


def subject_of(base: Path, tuned: Path) -> Subject:
    """The eight tasks' experts, fine-tunes and adapters; what is missing of the latter is made.

    Raises:
        FileNotFoundError: an expert or a fine-tune is not there; the message says how it is made.
    """
    experts, folders, adapters = {}, {}, {}
    for name, task in TASKS.items():
        files = [expert_file(task, "calibrated", folder) for folder in (SHIPPED, EXPERTS)]
        found = [file for file in files if file.is_file()]
        if not found or not (tuned / name / "model.safetensors").is_file():
            raise FileNotFoundError(f"{name} has no expert or no fine-tune in {tuned}; examples/README.md makes both")
        experts[name], folders[name] = found[0], tuned / name
        adapters[name] = write_adapter(base, tuned / name, INSTALLED / f"adapters-r{RANK}" / name, RANK)
    return Subject(base, packaged_gguf(), experts, folders, adapters)


def llama_parts(subject: Subject, python: Path) -> tuple[Path, dict[str, Path]]:
    """llama.cpp's server and its adapters; what is missing is built."""
    converted = {name: llama_adapter(python, subject.base, folder) for name, folder in subject.adapters.items()}
    return llama_server(python), converted


def run(subject: Subject, effort: Effort) -> tuple[list[Row], list[Bar]]:
    """Start every server that can run here, and measure."""
    python = environment()
    build, converted = llama_parts(subject, python)
    makers: dict[str, Callable[[], AbstractContextManager[Peer]]] = {
        "switchyard, bfloat16": lambda: ours(subject, BaseWeights.FULL),
        "switchyard, int4": lambda: ours(subject, BaseWeights.INT4),
        "transformers + PEFT, an adapter at a time": lambda: peft(subject, python, mixed=False),
        "transformers + PEFT, adapters mixed in a batch": lambda: peft(subject, python, mixed=True),
        "transformers serve, a request at a time": lambda: transformers_serve(subject, python, batching=False),
        "transformers serve, batching continuously": lambda: transformers_serve(subject, python, batching=True),
        "llama.cpp": lambda: llama(subject, build, converted),
    }
    peers: list[Peer] = []
    skipped: list[Row] = []
    with ExitStack() as stack:
        for name, maker in makers.items():
            try:
                peers.append(stack.enter_context(maker()))
            except PeerError as problem:
                skipped.append({"server": name, "skipped": str(problem)})
                print(f"{name}: cannot run here", file=sys.stderr)
            else:
                print(f"{name}: is ready", file=sys.stderr)
        tests = {name: load_rows(TASKS[name], "test") for name in subject.experts}
        rows, bars = asyncio.run(measure(peers, tests, effort))
    return [*rows, *skipped], bars


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.peers", description=__doc__)
    parser.add_argument("--base", type=Path, required=True, help="base folder (safetensors)")
    parser.add_argument("--tuned", type=Path, required=True, help="folder with one fine-tune per task in it")
    parser.add_argument("--prepare", action="store_true", help="download, build and convert; measure nothing")
    parser.add_argument("--rounds", type=int, default=FULL.rounds, help=f"of the mixed trace (default {FULL.rounds})")
    parser.add_argument("--quick", action="store_true", help="a few requests, nothing written")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result")
    given = parser.parse_args()
    if not (given.quick or given.prepare) and HOLD_BACK & set(os.environ):
        parser.error(f"{' and '.join(sorted(HOLD_BACK & set(os.environ)))} would hold the peers back; unset it")
    subject = subject_of(given.base, given.tuned)
    if given.prepare:
        llama_parts(subject, environment())
        return
    rows, bars = run(subject, QUICK if given.quick else replace(FULL, rounds=given.rounds))
    show([row for row in rows if "server" in row], title="one mixed trace")
    show([row for row in rows if "against" in row], bars, title="ours against theirs, in turns")
    if not given.quick:
        write("peers", "python -m bench.peers " + " ".join(sys.argv[1:]), rows, bars, folder=given.out)


if __name__ == "__main__":
    main()
