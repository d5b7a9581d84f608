"""A report of routing on the screen, and its map as a picture."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from server.client import Json
from store.errors import MissingPackageError, SwitchyardError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLUMN = 5
"""Characters of a column of the matrix."""
_LISTED = 28
"""Experts in one column of the legend."""
_MARKERS = "osD^vP*X"


def print_matrix(report: Json, out: Console) -> None:
    """Rows are experts, columns are where their own exemplars would go; without room for that, only the worst."""
    experts = report["experts"]
    if not experts:
        out.print("no expert has exemplars to be found by: there is nothing to confuse")
        return
    longest = max(len(expert["id"]) for expert in experts)
    if longest + 8 + _COLUMN * (len(experts) + 2) <= out.width:
        out.print(_matrix(report))
    else:
        out.print(_summary(report))
    right = sum(expert["routed_to"][i] for i, expert in enumerate(experts))
    total = sum(map(_total, experts))
    left_out = f"; {report['left_out']} more experts are not shown" if report["left_out"] else ""
    out.print(f"{right} of {total} exemplars find their own expert ({right / total:.1%}){left_out}")
    out.print(f"[dim]{escape(report['method'])}[/]")


def draw_map(report: Json, path: Path) -> None:
    """Write the map as a PNG: centres of each expert in its colour, general text in grey, recent requests as crosses.

    Raises:
        MissingPackageError: matplotlib is not installed.
        SwitchyardError: the file cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingPackageError("maps need the package matplotlib: pip install 'switchyard[plots]'") from None
    columns = max(1, math.ceil((len(report["experts"]) + 2) / _LISTED))
    figure = Figure(figsize=(9.5 + 2.2 * columns, 8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    outside = _draw(report, axes)
    title = f"Centres of {len(report['experts'])} experts as the router compares them"
    if report["left_out"]:
        title += f" ({report['left_out']} more are not shown)"
    axes.set_title(title)
    for axis, share, which in zip((axes.xaxis, axes.yaxis), report["axes"], ("first", "second"), strict=True):
        axis.set_label_text(f"{which} principal component ({share:.0%} of the spread)")
    if outside:
        axes.text(0.01, 0.01, f"beyond the edges: {outside} recent requests", transform=axes.transAxes, color="0.4")
    if report["experts"]:
        figure.legend(loc="outside right upper", ncols=columns, frameon=False, fontsize="small")
    try:
        figure.savefig(path, format="png", dpi=120)
    except OSError as error:
        raise SwitchyardError(f"cannot write {path}: {error.strerror}") from None


def _draw(report: Json, axes: Axes) -> int:
    """Draw everything. Returns how many recent requests lie outside: far ones must not press the rest into a corner."""
    experts = report["experts"]
    own = dict(zip((expert["id"] for expert in experts), _colours(len(experts)), strict=True))
    if report["background"]:
        axes.scatter(*_columns(report["background"]), s=14, color="0.75", label="general text", zorder=1)
    for i, expert in enumerate(experts):
        marker = _MARKERS[i // 10 % len(_MARKERS)]
        requests = f" ({expert['recent_requests']} recent)" if expert["recent_requests"] else ""
        xs, ys = _columns(expert["centres"])
        colour, label = own[expert["id"]], _short(expert["id"]) + requests
        axes.scatter(
            xs, ys, s=42, marker=marker, color=colour, edgecolors="white", linewidths=0.6, label=label, zorder=2
        )
    low, high = _bounds(report)
    axes.set_xlim(low[0], high[0])
    axes.set_ylim(low[1], high[1])
    recent = report["recent"]
    if recent:
        xs, ys = [one["x"] for one in recent], [one["y"] for one in recent]
        told = [own.get(one["id"], "black") for one in recent]
        axes.scatter(xs, ys, s=22, marker="x", c=told, linewidths=0.9, alpha=0.7, zorder=3)
        axes.scatter([], [], s=22, marker="x", color="black", label="recent requests (black: the base)")
    return sum(not (low[0] <= one["x"] <= high[0] and low[1] <= one["y"] <= high[1]) for one in recent)


def _columns(places: list[list[float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in places], [y for _, y in places]


def _colours(count: int) -> list[tuple[float, float, float, float]]:
    """None of them grey, which is general text's; experts that follow each other differ most."""
    from matplotlib import colormaps

    if count <= 18:
        few = colormaps["tab10" if count <= 9 else "tab20"]
        distinct = [few(i) for i in range(few.N)]
        return [colour for colour in distinct if max(colour[:3]) - min(colour[:3]) > 0.05][:count]
    return [colormaps["turbo"](i * 0.618034 % 1) for i in range(count)]


def _bounds(report: Json) -> tuple[list[float], list[float]]:
    """The corners of what is always shown, with a margin."""
    places = [place for expert in report["experts"] for place in expert["centres"]] + report["background"]
    low, high = [], []
    for values in zip(*(places or [[0.0, 0.0]]), strict=True):
        margin = 0.06 * (max(values) - min(values)) or 1.0
        low.append(min(values) - margin)
        high.append(max(values) + margin)
    return low, high


def _matrix(report: Json) -> Table:
    experts = report["experts"]
    table = Table("", "expert", box=None, pad_edge=False)
    table.columns[0].justify = "right"
    for heading in (*(str(i + 1) for i in range(len(experts))), "other", "base"):
        table.add_column(heading, justify="right")
    for i, expert in enumerate(experts):
        counts = [*expert["routed_to"], expert["routed_to_others"], expert["routed_to_base"]]
        cells = [f"[bold]{n}[/]" if j == i else f"[red]{n}[/]" if n else "[dim]·[/]" for j, n in enumerate(counts)]
        table.add_row(str(i + 1), escape(expert["id"]), *cells)
    return table


def _summary(report: Json) -> Table:
    experts = report["experts"]
    table = Table("expert", "its own", "base", "other", "most confused with", box=None, pad_edge=False)
    for column in table.columns[1:4]:
        column.justify = "right"
    for i, expert in enumerate(experts):
        counts, total = expert["routed_to"], max(1, _total(expert))
        wrong = sorted((-n, j) for j, n in enumerate(counts) if n and j != i)[:3]
        confused = ", ".join(f"{experts[j]['id']} {-n / total:.0%}" for n, j in wrong)
        shares = (counts[i], expert["routed_to_base"], sum(counts) - counts[i] + expert["routed_to_others"])
        table.add_row(escape(expert["id"]), *(f"{n / total:.0%}" for n in shares), escape(confused))
    return table


def _total(expert: Json) -> int:
    return int(sum(expert["routed_to"]) + expert["routed_to_others"] + expert["routed_to_base"])


def _short(name: str) -> str:
    """For the legend; an underscore in front would hide it there, which names of experts do not have."""
    return name if len(name) <= 24 else f"{name[:23]}…"
