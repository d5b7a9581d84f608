"""What a merge loses and routing keeps: several experts as one static expert, or every prompt to its own.

`python -m bench.merging --base FOLDER` merges the experts of four tasks by every method of `switchyard merge` and
scores the results on held-out rows; beside them the base, each expert alone on its own task, and the same experts
behind a running server, called by name and through `model: auto`. A method's strength is the one that does best on rows
of the end of each held-out set, which no score is taken of. Scores are kept under `.cache/bench/`, so an interrupted
run goes on where it was. `--quick` takes 2 tasks, 3 methods and 4 rows, and writes nothing.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.progress import track

from bench.first_table import Kept, Offline
from bench.report import RESULTS, Bar, Row, bar, show, write
from bench.served import ask, serving
from examples.build import load_rows
from examples.evaluate import SPARE_TOKENS
from examples.fetch import CACHE
from examples.tasks import TASKS
from store.checkpoint import open_checkpoint
from store.expert_file import digest_of
from store.fingerprint import manifest_of
from store.merge_methods import MergeSettings, Method
from store.merging import merge_experts

FOLDER = CACHE.parent / "bench" / "merging"
FOUR = ("cron", "ha_intent", "langid", "num_fr")
SUMS, USUAL, ONE = (0.3, 0.5, 0.7, 1.0), (0.5, 1.0, 1.5), (1.0,)
STRENGTHS: Mapping[Method, Sequence[float]] = {
    Method.TASK_ARITHMETIC: SUMS,
    Method.DARE: SUMS,
    Method.TIES: USUAL,
    Method.RAM: USUAL,
    Method.RAM_PLUS: ONE,
    Method.RAM_PLUS_CHANGED: ONE,
    Method.RAM_PLUS_TENSOR: ONE,
    Method.OPCM: (1.0, 1.5, 2.0),
    Method.ATLAS: ONE,
}
"""Strengths tried of each method; the merged delta is multiplied by them."""
CHOOSING_ROWS = 20

Scores = Mapping[str, float]


class Tasks:
    """Rows of some tasks, and scores that are kept.

    Args:
        names: of the tasks.
        rows: held-out rows of each to score.
        choosing: rows of each to choose strengths on, from the other end.
    """

    def __init__(self, names: Sequence[str], rows: int, choosing: int, offline: Offline, kept: Kept) -> None:
        self.names = names
        self._offline, self.kept = offline, kept
        tests = {name: load_rows(TASKS[name], "test") for name in names}
        self.test = {name: test[:rows] for name, test in tests.items()}
        self._choosing = {name: test[max(rows, len(test) - choosing) :] for name, test in tests.items()}

    def scores(self, what: str, load: Callable[[], None], *, choosing: bool = False) -> Scores:
        """Share of right answers by task, of the weights that `load` puts into the model."""
        found, loaded = {}, False
        for name, rows in (self._choosing if choosing else self.test).items():

            def measure(name: str = name, rows: Sequence[Row] = rows) -> float:
                nonlocal loaded
                if not loaded:
                    load()
                    loaded = True
                return self._offline.score(TASKS[name], list(rows))  # type: ignore[arg-type]

            part = "choosing" if choosing else "test"
            found[name] = float(self.kept.get(f"{what}/{name}/{part}/{len(rows)}", measure))
        return found


def mean(scores: Scores) -> float:
    """Over the tasks."""
    return sum(scores.values()) / len(scores)


def merged_file(method: Method, files: Sequence[Path], base: Path) -> Path:
    """The experts merged by a method, at strength 1."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    out = FOLDER / f"{method.value}-{'-'.join(file.stem for file in files)}.safetensors"
    settings = MergeSettings(method, strength=1.0)
    pairs = [(file, 1.0) for file in files]
    merge_experts(pairs, manifest_of(base, CACHE.parent), out, settings, weights=open_checkpoint(base))
    return out


def static_row(method: Method, file: Path, tasks: Tasks, offline: Offline) -> Row:
    """A merge at the strength that suits it best."""
    digest, strengths = digest_of(file), STRENGTHS[method]

    def scores(strength: float, *, choosing: bool = False) -> Scores:
        return tasks.scores(f"{digest}/{strength}", lambda: offline.load_expert(file, strength), choosing=choosing)

    best = max(strengths, key=lambda strength: mean(scores(strength, choosing=True)) if len(strengths) > 1 else 0.0)
    found = scores(best)
    return {"experts": f"merged: {method.value}", "strength": best, **found, "mean": mean(found)}


def served_rows(tasks: Tasks, files: Sequence[Path], base: Path, offline: Offline) -> list[Row]:
    """The same experts behind a server: by name, then routed, with the share of prompts that found their own."""
    named: dict[str, float] = {}
    routed: dict[str, float] = {}
    found: dict[str, float] = {}
    with TemporaryDirectory() as folder:
        library = Path(folder) / "experts"
        library.mkdir()
        for file in files:
            shutil.copy(file, library)
        arguments = ("--base", base, "--base-name", "base", "--experts", library, "--cache-dir", CACHE.parent)
        with serving(*arguments, "--data-dir", Path(folder) / "data") as url:
            for name, rows in tasks.test.items():
                lengths = [len(offline.tokenizer(r["answer"], add_special_tokens=False)["input_ids"]) for r in rows]
                for model, scores in ((name, named), ("auto", routed)):
                    answers = ask(url, model, [row["prompt"] for row in rows], max(lengths) + SPARE_TOKENS)
                    right = [TASKS[name].score(a.text, row["answer"]) for a, row in zip(answers, rows, strict=True)]
                    scores[name] = sum(right) / len(right)
                found[name] = sum(answer.mix == f"{name}=1" for answer in answers) / len(answers)
    return [
        {"experts": "served, by name", **named, "mean": mean(named)},
        {"experts": "served, model: auto", **routed, "mean": mean(routed)},
        {"experts": "(routed to its own)", **found, "mean": mean(found)},
    ]


def bars_of(rows: Sequence[Row]) -> list[Bar]:
    """Routing against the best merge, and against knowing the task."""
    means = {str(row["experts"]): float(str(row["mean"])) for row in rows}
    best = max(value for name, value in means.items() if name.startswith("merged"))
    auto, named = means["served, model: auto"], means["served, by name"]
    return [
        bar("merging.routed", "several experts: score routed − score of the best static merge", auto - best, ">=", 0.0),
        bar("merging.oracle", "several experts: score routed / score by name", auto / named, ">=", 0.95),
    ]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.merging", description=__doc__)
    parser.add_argument("--base", type=Path, required=True, help="base folder (safetensors)")
    parser.add_argument("--experts", type=Path, default=Path("examples/experts"), help="folder of the shipped experts")
    parser.add_argument("--tasks", nargs="+", default=list(FOUR), choices=sorted(TASKS), help="whose experts")
    parser.add_argument("-n", type=int, default=100, help="held-out rows per task (default 100, at most 180)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where merging.json goes")
    parser.add_argument("--quick", action="store_true", help="2 tasks, 3 methods and 4 rows; nothing written")
    args = parser.parse_args()
    names, n, choosing, methods = args.tasks, args.n, CHOOSING_ROWS, list(STRENGTHS)
    if args.quick:
        names, n, choosing, methods = names[:2], 4, 2, [Method.TASK_ARITHMETIC, Method.TIES, Method.ATLAS]
    files = [args.experts / f"{name}.safetensors" for name in names]
    offline = Offline(args.base)
    tasks = Tasks(names, n, choosing, offline, Kept(FOLDER / ("quick.json" if args.quick else "scores.json")))
    nothing = tasks.scores("base", lambda: offline.load_folder(args.base))
    alone: dict[str, float] = {}
    for name, file in zip(names, files, strict=True):
        own = Tasks([name], n, choosing, offline, tasks.kept)
        alone |= own.scores(f"{digest_of(file)}/1.0", lambda file=file: offline.load_expert(file))  # type: ignore[misc]
    rows: list[Row] = [
        {"experts": "none: the base", **nothing, "mean": mean(nothing)},
        {"experts": "each alone on its task", **alone, "mean": mean(alone)},
    ]
    for method in track(methods, "merging and scoring"):
        rows.append(static_row(method, merged_file(method, files, args.base), tasks, offline))
    rows += served_rows(tasks, files, args.base, offline)
    bars = bars_of(rows)
    show(rows, bars, title=f"{len(names)} experts: merged, and routed")
    if not args.quick:
        write("merging", "python -m bench.merging " + " ".join(sys.argv[1:]), rows, bars, folder=args.out)


if __name__ == "__main__":
    main()
