"""The first table: what eight real fine-tunes keep when they are compressed 40 times and served by routing.

After `python -m examples.compress`, `python -m bench.first_table --base FOLDER --tuned FOLDER` scores on held-out rows
of every task: the base, the fine-tune, T-Switch with the paper's RMS knob and with the calibrated one (both merged
offline), and the calibrated expert behind a running server, called by name and through `model: auto`; then 200
unrelated prompts, which the base should answer. Every score is kept under `.cache/bench/`, so an interrupted run goes
on where it was.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench.report import Bar, bar, write
from bench.served import ask, routes, serving
from bench.unrelated import unrelated_prompts
from examples.build import load_rows
from examples.compress import EXPERTS, compress_task, expert_file
from examples.evaluate import SPARE_TOKENS, evaluate, evaluate_fair
from examples.fetch import CACHE
from examples.finetune import load_base
from examples.tasks import TASKS, Row, Task
from store.apply import apply_expert
from store.expert_file import digest_of, read_header

Score = float
SCORES = CACHE.parent / "bench" / "first_table.json"


class Kept:
    """Scores that survive an interruption, by what they depend on."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}

    def get(self, key: str, measure: Callable[[], Any]) -> Any:
        if key not in self._known:
            self._known[key] = measure()
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_text(json.dumps(self._known, indent=1))
        return self._known[key]


class Offline:
    """One model in memory that takes the base's weights, a fine-tune's, or base plus expert in turn."""

    def __init__(self, base: Path) -> None:
        self._base = base
        self.model, self.tokenizer = load_base(base, torch.device("cpu"))

    def load(self, state: dict[str, torch.Tensor]) -> None:
        self.model.load_state_dict(state, strict=False)
        self.model.tie_weights()

    def load_expert(self, file: Path, weight: float = 1.0) -> None:
        self.load(apply_expert(file, self._base, weight=weight, cache_dir=CACHE.parent))

    def load_folder(self, folder: Path) -> None:
        from safetensors.torch import load_file

        self.load(load_file(folder / "model.safetensors"))

    def score(self, task: Task, rows: list[Row], *, fair: bool = False) -> Score:
        if fair:
            return evaluate_fair(self.model, self.tokenizer, rows, task)
        return evaluate(self.model, self.tokenizer, rows, task.score)


def offline_scores(
    task: Task, rows: list[Row], offline: Offline, base: Path, tuned: Path, experts: Path, kept: Kept
) -> dict[str, Any]:
    """Base, fine-tune and both knobs, without the server."""
    calibrated = expert_file(task, "calibrated", experts)
    digest = digest_of(calibrated)
    key = f"{task.name}/{len(rows)}/{digest}"
    rms = expert_file(task, "rms", SCORES.parent)

    def measure(prepare: Callable[[], object], *, fair: bool = False) -> Score:
        prepare()
        return offline.score(task, rows, fair=fair)

    def with_rms() -> None:
        compress_task(task, base, tuned, rms, "rms", CACHE.parent)
        offline.load_expert(rms)

    row: dict[str, Any] = {"task": task.name, "n": len(rows), "digest": digest}
    trained = json.loads((tuned / "finetune.json").read_text())
    row |= {"steps": trained["steps"], "train_seconds": round(trained["seconds"])}
    base_key = f"{task.name}/{len(rows)}/base"
    row["base"] = kept.get(base_key, lambda: measure(lambda: offline.load_folder(base)))
    row["base_fair"] = kept.get(f"{base_key}/fair", lambda: measure(lambda: offline.load_folder(base), fair=True))
    row["fine_tuned"] = kept.get(f"{key}/tuned", lambda: measure(lambda: offline.load_folder(tuned)))
    row["t_switch_rms"] = kept.get(f"{key}/rms", lambda: measure(with_rms))
    row["t_switch_calibrated"] = kept.get(f"{key}/calibrated", lambda: measure(lambda: offline.load_expert(calibrated)))
    gain = row["fine_tuned"] - row["base"]
    row["retention"] = (row["t_switch_calibrated"] - row["base"]) / gain if gain else None
    header = read_header(calibrated)
    row["bits_per_param"] = header.bits_per_param
    row["bytes"] = calibrated.stat().st_size
    row["times_smaller"] = 2 * sum(p.numel() for p in offline.model.parameters()) / row["bytes"]
    return row


def served_scores(url: str, task: Task, rows: list[Row], offline: Offline, kept: Kept, key: str) -> dict[str, Any]:
    """The same rows through the server: by name, and routed."""
    lengths = [len(offline.tokenizer(row["answer"], add_special_tokens=False)["input_ids"]) for row in rows]
    limit = max(lengths) + SPARE_TOKENS

    def measure(model: str) -> dict[str, float]:
        answers = ask(url, model, [row["prompt"] for row in rows], limit)
        right = sum(task.score(answer.text, row["answer"]) for answer, row in zip(answers, rows, strict=True))
        chosen = sum(answer.mix == f"{task.name}=1" for answer in answers)
        return {"score": right / len(rows), "chosen": chosen / len(rows)}

    named = kept.get(f"{key}/named", lambda: measure(task.name))
    routed = kept.get(f"{key}/auto", lambda: measure("auto"))
    return {"served_by_name": named["score"], "served_auto": routed["score"], "routed_right": routed["chosen"]}


def bars_of(rows: list[dict[str, Any]], fallback: float) -> list[Bar]:
    """The issue's bars, met or not."""

    def mean(column: str) -> float:
        return float(sum(row[column] for row in rows) / len(rows))

    least_gain = min(row["fine_tuned"] - row["base"] for row in rows)
    least_smaller = min(row["times_smaller"] for row in rows)
    auto = mean("served_auto") / mean("served_by_name")
    return [
        bar("first.tasks", "tasks trained and measured", len(rows), ">=", 6),
        bar("first.gain", "smallest gain of a fine-tune over the base", least_gain, ">=", 0.3),
        bar("first.retention", "T-Switch calibrated: mean share of the gain kept", mean("retention"), ">=", 0.97),
        bar("first.smaller", "times smaller than bf16, the least of all", least_smaller, ">=", 40),
        bar("first.auto", "score through model: auto / score by name", auto, ">=", 0.95),
        bar("first.fallback", "unrelated prompts answered by the base", fallback, ">=", 0.90),
    ]


def show(rows: list[dict[str, Any]], out: Console) -> None:
    columns = {
        "task": "task", "base": "base", "base_fair": "base, fair", "fine_tuned": "fine-tuned",
        "t_switch_rms": "T-Switch (rms)", "t_switch_calibrated": "T-Switch (calibrated)",
        "bits_per_param": "bits/param", "times_smaller": "× smaller", "served_auto": "model: auto",
        "routed_right": "routed right",
    }  # fmt: skip
    table = Table(*columns.values())
    for row in rows:
        cells = [row[column] for column in columns]
        table.add_row(*(f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in cells))
    out.print(table)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.first_table", description=__doc__)
    parser.add_argument("--base", type=Path, required=True, help="base folder (safetensors)")
    parser.add_argument("--tuned", type=Path, required=True, help="folder with one fine-tune per task in it")
    parser.add_argument("--experts", type=Path, default=EXPERTS, help="folder of examples.compress (default: its own)")
    parser.add_argument("-n", type=int, default=100, help="held-out rows per task (default 100, at most 200)")
    parser.add_argument(
        "--quick", action="store_true", help="4 rows of 2 tasks and 8 unrelated prompts, nothing written"
    )
    args = parser.parse_args()
    out = Console()
    tasks = [task for task in TASKS.values() if expert_file(task, "calibrated", args.experts).is_file()]
    n, unrelated, kept = args.n, unrelated_prompts(), Kept(SCORES)
    if args.quick:
        tasks, n, unrelated, kept = tasks[:2], 4, unrelated[:8], Kept(SCORES.with_suffix(".quick.json"))
    offline = Offline(args.base)
    rows = []
    tests = {task.name: load_rows(task, "test")[:n] for task in tasks}
    for task in tasks:
        test = tests[task.name]
        with out.status(f"{task.name}: offline scores"):
            rows.append(offline_scores(task, test, offline, args.base, args.tuned / task.name, args.experts, kept))
        out.print(f"{task.name}: " + ", ".join(f"{k} {v:.3g}" for k, v in rows[-1].items() if isinstance(v, float)))
    state = ["--base", args.base, "--base-name", "base", "--experts", args.experts, "--cache-dir", CACHE.parent]
    library = "+".join(sorted(row["digest"] for row in rows))
    # A store of its own: one that is left over may hold an older expert under the same name.
    with TemporaryDirectory() as data, serving(*state, "--data-dir", data) as url:
        for task, row in zip(tasks, rows, strict=True):
            key = f"{task.name}/{n}/served/{library}"
            with out.status(f"{task.name}: through the server"):
                row |= served_scores(url, task, tests[task.name], offline, kept, key)
        fallback = kept.get(
            f"unrelated/{len(unrelated)}/{library}",
            lambda: sum(not mix for mix in routes(url, unrelated)) / len(unrelated),
        )
    show(rows, out)
    bars = bars_of(rows, fallback)
    for one in bars:
        met = "met   " if one["met"] else "MISSED"
        out.print(f"{met} {one['what']}: {one['value']:.4g} {one['op']} {one['goal']:g}")
    if not args.quick:
        write("first_table", "python -m bench.first_table " + " ".join(sys.argv[1:]), rows, bars)


if __name__ == "__main__":
    main()
