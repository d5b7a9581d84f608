"""Nothing is tied to one architecture: experts of Gemma 3 270M, made, served and scored.

Gemma has tied embeddings of 262,144 tokens, norms around each block, and attention over a sliding window. After
`python -m examples.gemma` and `python -m examples.finetune`, `python -m bench.second_base --base FOLDER --tuned FOLDER`
measures base, fine-tune, T-Switch and FlexSwitch offline as `bench.fidelity` does, and asks a running server the same
prompts, expert by expert. Cells are kept under `.cache/bench/second-base/`; a killed run goes on where it was.
"""

from __future__ import annotations

import argparse
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bench.fidelity import Kept, measure_all
from bench.fidelity_cells import BASE, TUNED, Cell, Column, flex_switch, t_switch
from bench.fidelity_report import retention
from bench.report import Bar, bar, show, write
from bench.served import ask, serving
from examples.build import load_rows
from examples.evaluate import SPARE_TOKENS
from examples.fetch import CACHE
from examples.tasks import TASKS

FOLDER = CACHE.parent / "bench" / "second-base"
COLUMNS: Sequence[Column] = (
    (BASE, 0.0),
    (TUNED, 0.0),
    flex_switch("KL", 0.04),
    t_switch("calibrated", 0.08, 0.4),
)
FEWEST = 2
"""Experts that the issue asks for."""


def served_scores(base: Path, experts: Mapping[str, Path], n: int) -> dict[str, float]:
    """Scores of the same rows through a server that holds these experts, by name."""
    from transformers import AutoTokenizer  # slow to import

    tokenizer: Any = AutoTokenizer.from_pretrained(base)
    found = {}
    with TemporaryDirectory() as folder:
        library = Path(folder) / "experts"
        library.mkdir()
        for name, path in experts.items():
            shutil.copy(path, library / f"{name}.safetensors")
        arguments = ("--base", base, "--base-name", "gemma", "--experts", library, "--cache-dir", CACHE.parent)
        with serving(*arguments, "--data-dir", Path(folder) / "data") as url:
            for name in experts:
                rows = load_rows(TASKS[name], "test")[:n]
                lengths = [len(tokenizer(row["answer"], add_special_tokens=False)["input_ids"]) for row in rows]
                answers = ask(url, name, [row["prompt"] for row in rows], max(lengths) + SPARE_TOKENS)
                right = [TASKS[name].score(a.text, row["answer"]) for a, row in zip(answers, rows, strict=True)]
                found[name] = sum(right) / len(right)
    return found


def bars_of(rows: Sequence[Mapping[str, Any]]) -> list[Bar]:
    """What the issue asks of a second base."""
    tasks = {row["task"] for row in rows}
    sparse = [row["retention"] for row in rows if str(row["method"]).startswith("T-Switch")]
    apart = max(abs(row["served"] - row["score"]) for row in rows if "served" in row)
    return [
        bar("second.experts", "experts of a second base, Gemma 3 270M", len(tasks), ">=", FEWEST),
        bar("second.retention", "its T-Switch: mean share of the gain kept", sum(sparse) / len(sparse), ">=", 0.97),
        bar("second.served", "its scores through the server: farthest from those offline", apart, "<=", 0.02),
    ]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.second_base", description=__doc__)
    parser.add_argument("--base", type=Path, required=True, help="folder that examples.gemma made")
    parser.add_argument("--tuned", type=Path, required=True, help="folder with one fine-tune per task in it")
    parser.add_argument("-n", type=int, default=100, help="held-out rows per score (default 100, at most 200)")
    args = parser.parse_args()
    tasks = [name for name in TASKS if (args.tuned / name / "finetune.json").is_file()]
    wanted = [Cell(task, method, size) for task in tasks for method, size in COLUMNS]

    from bench.fidelity_measure import Bench  # slow to import

    bench, kept = Bench(args.base, args.tuned, FOLDER, CACHE.parent, args.n), Kept(FOLDER)
    measure_all(bench, kept, wanted, math.inf)
    found = {cell: measured for cell in wanted if (measured := kept.find(cell, bench.identity(cell))) is not None}
    served: dict[Cell, float] = {}
    for method, size in COLUMNS[2:]:
        files = {task: FOLDER / f"{Cell(task, method, size).key}.safetensors" for task in tasks}
        scores = served_scores(args.base, files, args.n)
        served |= {Cell(task, method, size): score for task, score in scores.items()}
    rows: list[dict[str, Any]] = []
    for cell, measured in found.items():
        extra = {"served": served[cell]} if cell in served else {}
        rows.append({**measured, "retention": retention(cell, found)} | extra)
    bars = bars_of(rows)
    figures = ("task", "method", "score", "retention", "served", "bits_per_param", "times_smaller", "kl", "seconds")
    show([{key: row.get(key) for key in figures} for row in rows], bars, title="Gemma 3 270M")
    write("second_base", "python -m bench.second_base --base FOLDER --tuned FOLDER", rows, bars)


if __name__ == "__main__":
    main()
