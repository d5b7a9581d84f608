"""Table, bars and curve of `bench.fidelity`, of as many cells as are measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from bench.fidelity_cells import BASE, SIZES, TUNED, Cell
from bench.report import Bar, bar

Found = Mapping[Cell, Mapping[str, Any]]
FLEX = "FlexSwitch (KL)"
FIGURES = "bits_per_param", "bytes", "times_smaller", "seconds", "cpu_seconds", "kl", "score"
MISSING = "missing"
FAITHFUL = 0.99
"""Share of the gain that counts as all of it."""
GOALS = ((FLEX, 0.04, 0.99), (FLEX, 0.02, 0.97), ("T-Switch (calibrated)", 0.4, 0.98))


def retention(cell: Cell, found: Found) -> float | None:
    """(score − base's) / (fine-tune's − base's); None while one of the three is missing, or nothing was gained. What an
    earlier run measured is compared with that run's base and fine-tune."""
    if cell not in found:
        return None
    scores = [found.get(Cell(cell.task, method, 0.0), {}).get("score") for method in (BASE, TUNED)]
    low, high = found[cell].get("ends", scores)
    if low is None or high is None:
        return None
    return (found[cell]["score"] - low) / (high - low) if high > low else None


def rows_of(wanted: Sequence[Cell], found: Found) -> list[dict[str, Any]]:
    """One row per method and size: means over the tasks that are measured, and the retention of each task."""
    columns: dict[tuple[str, float], list[Cell]] = {}
    for cell in wanted:
        columns.setdefault((cell.method.name, cell.size), []).append(cell)
    return [_row(column, found) for column in columns.values()]


def _row(column: Sequence[Cell], found: Found) -> dict[str, Any]:
    measured = [found[cell] for cell in column if cell in found]
    each = {cell.task: retention(cell, found) for cell in column}
    known = [value for value in each.values() if value is not None]
    row: dict[str, Any] = {"method": column[0].method.name, "size": column[0].size, "tasks": len(measured)}
    row["runs"] = sorted({measurement["run"]["commit"][:7] for measurement in measured if "run" in measurement})
    row["prompts"] = min((measurement["rows"] for measurement in measured), default=0)
    for figure in FIGURES:
        values = [measurement[figure] for measurement in measured if figure in measurement]
        row[figure] = mean(values) if values else None
    return (
        row
        | {"retention": mean(known) if known else None}
        | {task: MISSING if value is None else round(value, 4) for task, value in each.items()}
    )


def smallest_of(wanted: Sequence[Cell], found: Found) -> list[dict[str, Any]]:
    """For each task the smallest expert measured that keeps `FAITHFUL` of the gain; none, where none does."""
    rows = []
    for task in dict.fromkeys(cell.task for cell in wanted):
        kept = {cell: retention(cell, found) for cell in wanted if cell.task == task and cell.size}
        enough = [cell for cell, value in kept.items() if value is not None and value >= FAITHFUL]
        best = min(enough, key=lambda cell: float(found[cell]["bits_per_param"]), default=None)
        if best is not None:
            figures = {"faithful_at": found[best]["bits_per_param"], "bytes": found[best]["bytes"]}
            rows.append({"task": task, "method": best.method.name, **figures, "retention": kept[best]})
    return rows


def bars_of(wanted: Sequence[Cell], found: Found) -> list[Bar]:
    """The bars whose cells are measured for every task."""
    rows = {(row["method"], row["size"]): row for row in rows_of(wanted, found)}
    tasks = len({cell.task for cell in wanted})
    whole = {key: row for key, row in rows.items() if row["tasks"] == tasks and row["retention"] is not None}
    bars = []
    for method, size, goal in GOALS:
        if (row := whole.get((method, size))) is not None:
            what = f"{method} at {row['bits_per_param']:.3f} bits per parameter: mean share of the gain kept"
            bars.append(bar(f"fidelity.{method}.{size:g}", what, row["retention"], ">=", goal))
    for size in SIZES:
        ours = whole.get((FLEX, size))
        others = [row for (method, at), row in whole.items() if at == size and not method.startswith("FlexSwitch")]
        if ours is not None and others:
            best = max(others, key=lambda row: float(row["retention"]))
            what = (
                f"{FLEX} over the best other method at {size:g} bits per parameter, {best['method']}: share of the gain"
            )
            bars.append(bar(f"fidelity.ahead.{size:g}", what, ours["retention"] - best["retention"], ">=", 0.0))
    return bars


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Retention against bits per parameter, a line per method, as a PNG; points of fewer than all tasks are hollow."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    most = max((int(row["tasks"]) for row in rows), default=0)
    methods: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["retention"] is not None and row["bits_per_param"] is not None:
            methods.setdefault(str(row["method"]), []).append(row)
    for method, points in methods.items():
        points.sort(key=lambda row: float(row["bits_per_param"]))
        x, y = [row["bits_per_param"] for row in points], [row["retention"] for row in points]
        (line,) = axes.plot(x, y, label=method, linewidth=2 if method == FLEX else 1)
        for row in points:
            face = line.get_color() if row["tasks"] == most else "white"
            axes.plot(row["bits_per_param"], row["retention"], "o", color=line.get_color(), markerfacecolor=face)
    axes.set(xscale="log", xlabel="bits per parameter of the whole model", ylabel="share of the fine-tune's gain kept")
    axes.grid(alpha=0.3)
    if methods:
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=120, metadata={"Software": None})
