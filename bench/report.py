"""How a benchmark reports: a table on the terminal, and `bench/results/NAME.json` with the machine it ran on."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, TypedDict

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
PACKAGES = ("torch", "transformers", "numpy", "faiss-cpu", "triton")

LOG_WIDTH = 160
"""Columns of a table that goes to a file."""

Row = Mapping[str, object]


class Bar(TypedDict):
    """A figure that an issue sets a goal for."""

    id: str
    what: str
    value: float
    op: Literal[">=", "<="]
    goal: float
    met: bool


def bar(id_: str, what: str, value: float, op: Literal[">=", "<="], goal: float) -> Bar:
    """A bar, and whether it is met."""
    met = value >= goal if op == ">=" else value <= goal
    return {"id": id_, "what": what, "value": value, "op": op, "goal": goal, "met": met}


def write(
    name: str,
    command: str,
    rows: Sequence[Row],
    bars: Sequence[Mapping[str, Any]],
    *,
    device: str | None = None,
    folder: Path = RESULTS,
) -> Path:
    """Write the results of one benchmark, `folder/NAME.json`, and return the path.

    Args:
        command: what was run; paths below the checkout become relative to it.
        rows: the measurements.
        bars: made by `bar`.
        device: of a run on a GPU; becomes part of the file's name.
    """
    result = {
        "name": name,
        "command": command.replace(f"{ROOT}{os.sep}", ""),
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "rows": list(rows),
        "bars": list(bars),
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / (f"{name}.json" if device is None else f"{name}-{device}.json")
    scratch = path.with_suffix(".tmp")
    scratch.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(scratch, path)
    return path


def show(rows: Sequence[Row], bars: Sequence[Mapping[str, Any]] = (), *, title: str = "") -> None:
    """Print rows as a table, one column per key in order of appearance, and the bars below it.

    With rich where it is installed; a bare machine gets the same columns as plain text.
    """
    columns = list(dict.fromkeys(key for row in rows for key in row))
    right = [all(_is_number(row.get(column)) for row in rows) for column in columns]
    cells = [[_cell(row.get(column)) for column in columns] for row in rows]
    try:
        _draw(columns, right, cells, title)
    except ImportError:
        _print_plainly(columns, right, cells, title)
    for b in bars:
        print(f"{'met   ' if b['met'] else 'MISSED'} {b['what']}: {_cell(b['value'])} {b['op']} {_cell(b['goal'])}")


def _draw(columns: Sequence[str], right: Sequence[bool], cells: Sequence[Sequence[str]], title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title or None)
    for column, is_right in zip(columns, right, strict=True):
        table.add_column(column, justify="right" if is_right else "left")
    for row in cells:
        table.add_row(*row)
    (Console() if sys.stdout.isatty() else Console(width=LOG_WIDTH)).print(table)


def _print_plainly(columns: Sequence[str], right: Sequence[bool], cells: Sequence[Sequence[str]], title: str) -> None:
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    if title:
        print(title)
    for row in (columns, *cells):
        aligned = zip(row, widths, right, strict=True)
        print(
            "  ".join(
                f"{cell:>{width}}" if to_the_right else f"{cell:<{width}}" for cell, width, to_the_right in aligned
            )
        )


def machine() -> dict[str, object]:
    """What figures depend on. No host name, no path."""
    info: dict[str, object] = {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }
    for package in PACKAGES:
        try:
            info[package] = version(package)
        except PackageNotFoundError:
            continue
    torch = sys.modules.get("torch")  # a benchmark that does without torch need not load it for this
    if torch is not None and torch.cuda.is_available():
        info["gpu"] = torch.cuda.get_device_name()
    return info


def commit() -> str | None:
    """The commit of the checkout, with `+` where tracked files differ from it; None outside of git."""
    try:
        head = _git("rev-parse", "HEAD")
        return head + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _is_number(value: object) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)
