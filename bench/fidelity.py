"""How much of eight real fine-tunes each method keeps, and at what size.

`python -m bench.fidelity --base FOLDER --tuned FOLDER` measures cell after cell, task by method by size, the bars'
first, and keeps each under `.cache/bench/fidelity/`: it may be killed at any moment, and the same command goes on.
`--minutes` stops in time, `--report` measures nothing. Table, curve and JSON are made of the cells that there are;
those that are missing are named. A cell that is missing but stands in the JSON, of another fine-tune or other settings,
stays there with what its own base and fine-tune scored, and with the day and the commit that measured it.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.fidelity_cells import BASE, TUNED, Cell, cells
from bench.fidelity_report import bars_of, draw, rows_of, smallest_of
from bench.report import RESULTS, show, write
from examples.fetch import CACHE
from examples.tasks import TASKS

CELLS = CACHE.parent / "bench" / "fidelity"
PLOT = Path(__file__).parents[1] / "docs" / "fidelity.png"


class Kept:
    """Measurements on disk, one file each.

    Args:
        folder: where.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def find(self, cell: Cell, identity: str) -> dict[str, Any] | None:
        """The measurement of a cell, and its file's bits per parameter; None if there is none, or of something else."""
        try:
            found: dict[str, Any] = json.loads(self._path(cell).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        if found.get("identity") != identity:
            return None
        return found | ({"bits_per_param": 16 / found["times_smaller"]} if "times_smaller" in found else {})

    def keep(self, cell: Cell, identity: str, found: dict[str, Any]) -> None:
        """Write a measurement, whole or not at all."""
        self._folder.mkdir(parents=True, exist_ok=True)
        scratch = self._path(cell).with_suffix(".tmp")
        scratch.write_text(json.dumps({**found, "identity": identity}, indent=1), encoding="utf-8")
        os.replace(scratch, self._path(cell))

    def _path(self, cell: Cell) -> Path:
        return self._folder / f"{cell.key}.json"


def measure_all(bench: Any, kept: Kept, wanted: Sequence[Cell], deadline: float) -> None:
    """Measure what is missing, in order, until the deadline (of `time.monotonic`)."""
    for cell in wanted:
        identity = bench.identity(cell)
        if kept.find(cell, identity) is not None:
            continue
        if time.monotonic() > deadline:
            return
        found = bench.measure(cell)
        kept.keep(cell, identity, found)
        figures = ", ".join(f"{key} {value:.4g}" for key, value in found.items() if isinstance(value, float))
        print(f"{cell.key}: {figures}", flush=True)


def earlier(path: Path, wanted: Sequence[Cell]) -> dict[Cell, dict[str, Any]]:
    """The measurements of cells that a JSON of this benchmark holds, each with the scores of its base and fine-tune
    (`ends`), and of which run it is (`run`)."""
    if not path.is_file():
        return {}
    said = json.loads(path.read_text(encoding="utf-8"))
    run = {"date": said["date"], "commit": said["commit"], "cpu": said["machine"]["cpu"]}
    held = {(row["task"], row["method"], row["size"]): row for row in said["rows"] if "identity" in row}

    def ends(task: str) -> list[float | None]:
        return [held.get((task, method.name, 0.0), {}).get("score") for method in (BASE, TUNED)]

    found = {cell: held.get((cell.task, cell.method.name, cell.size)) for cell in wanted}
    return {cell: {"ends": ends(cell.task), "run": run} | row for cell, row in found.items() if row is not None}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.fidelity", description=__doc__)
    parser.add_argument("--base", type=Path, required=True, help="base folder (safetensors)")
    parser.add_argument("--tuned", type=Path, required=True, help="folder with one fine-tune per task in it")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no further cell after that long")
    parser.add_argument("--only", default="", help="only cells whose name has this in it")
    parser.add_argument("--report", action="store_true", help="measure nothing, report what there is")
    parser.add_argument("-n", type=int, default=200, help="held-out rows per score (default 200, which is all)")
    args = parser.parse_args()
    started = time.monotonic()
    tasks = [name for name in TASKS if (args.tuned / name / "finetune.json").is_file()]
    wanted = cells(tasks)

    from bench.fidelity_measure import Bench  # not needed for a report, and slow to import

    bench = Bench(args.base, args.tuned, CELLS, CACHE.parent, args.n)
    kept = Kept(CELLS)
    if not args.report:
        chosen = [cell for cell in wanted if args.only in cell.key]
        measure_all(bench, kept, chosen, started + 60 * args.minutes)
    found = earlier(RESULTS / "fidelity.json", wanted)
    found |= {cell: measured for cell in wanted if (measured := kept.find(cell, bench.identity(cell))) is not None}
    rows, bars = rows_of(wanted, found), bars_of(wanted, found)
    smallest = smallest_of(wanted, found)
    narrow = [{key: value for key, value in row.items() if key not in ("bytes", "score")} for row in rows]
    show([row for row in narrow if row["tasks"]], bars)
    show(smallest, title="the smallest expert that keeps 0.99 of the gain")
    missing = [cell.key for cell in wanted if cell not in found]
    print(f"{len(found)} of {len(wanted)} cells are measured" + (f"; the next is {missing[0]}" if missing else ""))
    command = f"python -m bench.fidelity --base {args.base} --tuned {args.tuned}"
    write("fidelity", command, [*rows, *smallest, *found.values()], bars)
    draw(rows, PLOT)  # last: a changed picture would make the JSON's commit a changed one


if __name__ == "__main__":
    main()
