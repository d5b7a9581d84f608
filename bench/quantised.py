"""What does a base in eight or four bits cost, and what does it give?

`python -m bench.quantised --base FOLDER` compares, in mixed mode with each of the demo's experts on held-out rows of
its task: the distributions of the next token after every token of the right answers (KL from the full base's to the
quantised one's, both with the same expert in full precision), how often both hold the same token the likeliest, the
task's score, and the time of a decode step, in turns. A base that comes out of a four-bit file has lost there what four
bits lose, so that its figures flatter. `--quick` takes one expert and 4 rows, and writes nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from bench.report import Row, show, write
from examples.build import load_rows
from examples.compress import EXPERTS, expert_file
from examples.fetch import CACHE
from examples.tasks import TASKS, Task
from examples.tasks import Row as Example
from server.engine.attention import AttentionBatch, Segment
from server.engine.engine import TransformersEngine
from server.engine.layout import Span
from server.engine.options import BaseWeights, EngineSettings, Mode
from server.engine.types import EngineRequest, SamplingParams
from store.expert_file import digest_of
from store.mix import BASE_MIX, Mix

DECODES = (1, 8)
SPARE_TOKENS = 8


@dataclass
class Subject:
    """An engine over one kind of weights, and what was measured with it."""

    kind: BaseWeights
    engine: TransformersEngine
    logits: list[torch.Tensor] = field(default_factory=list)
    step: dict[int, list[float]] = field(default_factory=dict)


def prompt_of(engine: TransformersEngine, example: Example) -> list[int]:
    return engine.tokenizer.encode_chat([{"role": "user", "content": example["prompt"]}])


def logits_of(subject: Subject, mix: Mix, rows: list[Example]) -> torch.Tensor:
    """Of every token of the right answers, `[tokens, vocabulary]`."""
    engine, found = subject.engine, []
    worker, model = engine._worker, engine._model
    experts = worker.residency.experts
    for example in rows:
        prompt = prompt_of(engine, example)
        tokens = prompt + engine.tokenizer.encode(example["answer"], special=False)
        wanted = list(range(len(prompt) - 1, len(tokens)))
        batch = AttentionBatch([Segment(0, len(tokens), 0, ())], None, model.device)
        spans = (Span(mix, 0, len(tokens)),), (Span(mix, 0, len(wanted)),)
        with worker.executor.mixed.carrying(*spans, experts):
            found.append(model.forward(tokens, batch, wanted))
    return torch.cat(found)


async def answers(subject: Subject, mix: Mix, rows: list[Example]) -> list[str]:
    """Greedy answers through the engine."""
    engine = subject.engine

    async def one(example: Example) -> str:
        most = len(engine.tokenizer.encode(example["answer"], special=False)) + SPARE_TOKENS
        request = EngineRequest(tuple(prompt_of(engine, example)), SamplingParams(most, 0.0), mix)
        tokens = [event.token async for event in engine.submit(request)]
        return engine.tokenizer.decode([token for token in tokens if token is not None])

    return list(await asyncio.gather(*(one(example) for example in rows)))


async def decode_times(subject: Subject, count: int, tokens: int) -> list[float]:
    """Seconds between tokens of `count` streams of the base that run together, the first few left out."""
    engine = subject.engine
    prompt = tuple(engine.tokenizer.encode("Once upon a time"))
    sampling = SamplingParams(tokens, 0.0, ignore_eos=True)

    async def one() -> list[float]:
        return [time.perf_counter() async for _ in engine.submit(EngineRequest(prompt, sampling, BASE_MIX))]

    streams = await asyncio.gather(*(one() for _ in range(count)))
    return [after - before for times in streams for before, after in itertools.pairwise(times[4:])]


async def measure(subjects: list[Subject], tasks: list[Task], experts: Path, n: int, rounds: int) -> list[Row]:
    files = {task.name: expert_file(task, "calibrated", experts) for task in tasks}
    rows: list[Row] = []
    for task in tasks:
        mix = Mix.of({digest_of(files[task.name]): 1.0})
        test = load_rows(task, "test")[:n]
        full: torch.Tensor | None = None
        for subject in subjects:
            said = await answers(subject, mix, test)  # brings the expert to the device
            score = sum(task.score(text, row["answer"]) for text, row in zip(said, test, strict=True)) / len(test)
            await subject.engine.inspect()  # the engine's thread has nothing left to do
            logits = logits_of(subject, mix, test).log_softmax(-1)
            full = logits if full is None else full
            kl = (full.exp() * (full - logits)).sum(-1)
            same = (full.argmax(-1) == logits.argmax(-1)).float().mean()
            rows.append(
                {"expert": task.name, "weights": subject.kind.value, "n": len(test), "score": score,
                 "KL, mean (nats)": float(kl.mean()), "KL, 99th percentile": float(kl.quantile(0.99)),
                 "same likeliest": float(same)}
            )  # fmt: skip
            print(rows[-1], flush=True)
    for _ in range(rounds):
        for count in DECODES:
            for subject in subjects:
                subject.step.setdefault(count, []).append(statistics.median(await decode_times(subject, count, 24)))
    for subject in subjects:
        for count, times in subject.step.items():
            ratios = [a / b for a, b in zip(subjects[0].step[count], times, strict=True)]
            rows.append(
                {"weights": subject.kind.value, "streams": count, "ms per step": 1e3 * statistics.median(times),
                 "× the full base's speed": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}
            )  # fmt: skip
    return rows


async def run(arguments: argparse.Namespace) -> list[Row]:
    tasks = [task for task in TASKS.values() if expert_file(task, "calibrated", arguments.experts).is_file()]
    tasks = tasks[:1] if arguments.quick else tasks
    files = {digest_of(file): file for task in tasks for file in [expert_file(task, "calibrated", arguments.experts)]}
    subjects = []
    for kind in BaseWeights:
        settings = EngineSettings(
            dtype="bfloat16", mode=Mode.MIXED, base_weights=kind, kv_bytes=256 << 20, prefix_cache=False
        )
        engine = TransformersEngine(
            arguments.base,
            name="base",
            settings=settings,
            read_expert=lambda digest: files[digest].read_bytes(),
            cache_dir=CACHE.parent,
        )
        await engine.start()
        subjects.append(Subject(kind, engine))
    try:
        n, rounds = (4, 2) if arguments.quick else (arguments.n, 7)
        return await measure(subjects, tasks, arguments.experts, n, rounds)
    finally:
        for subject in subjects:
            await subject.engine.stop()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.quantised", description=__doc__)
    parser.add_argument("--base", type=Path, required=True, help="base folder (safetensors)")
    parser.add_argument("--experts", type=Path, default=EXPERTS, help="folder of examples.compress (default: its own)")
    parser.add_argument("-n", type=int, default=50, help="held-out rows per task (default 50)")
    parser.add_argument("--quick", action="store_true", help="4 rows of 1 task, nothing written")
    arguments = parser.parse_args()
    rows = asyncio.run(run(arguments))
    show([row for row in rows if "expert" in row], title="fidelity, bfloat16 activations")
    show([row for row in rows if "streams" in row], title="decode steps of the base alone, in turns")
    if not arguments.quick:
        write("quantised", "python -m bench.quantised " + " ".join(sys.argv[1:]), rows, [])


if __name__ == "__main__":
    main()
