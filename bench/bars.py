"""Every bar of every committed result in one table: `python -m bench.bars`; `--readme` writes the README's tables."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
README = ROOT / "README.md"


def load(name: str) -> dict[str, Any]:
    """One committed result."""
    result: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return result


def bars_table() -> str:
    """All bars as a Markdown table: what was to be reached, what was measured, and where."""
    lines = ["| bar | goal | measured | met |", "|---|---|---|---|"]
    for path in sorted(RESULTS.glob("*.json")):
        for bar in load(path.stem).get("bars", []):
            met = "yes" if bar["met"] else "**no**"
            op = {">=": "≥", "<=": "≤"}[bar["op"]]
            lines.append(f"| {bar['what']} | {op} {bar['goal']:g} | {bar['value']:.3g} | {met} |")
    return "\n".join(lines)


def first_table() -> str:
    """The rows of `bench.first_table` as a Markdown table, with their means."""
    rows = load("first_table")["rows"]
    head = (
        "| task | base (fair¹) | fine-tuned | T-Switch (rms knob) | T-Switch (calibrated) | bits/param | "
        "× smaller than bf16 | through the server, `model: auto` | routed to the right expert |"
    )
    scores = (
        "base",
        "base_fair",
        "fine_tuned",
        "t_switch_rms",
        "t_switch_calibrated",
        "bits_per_param",
        "times_smaller",
        "served_auto",
        "routed_right",
    )
    mean = {"task": "**mean**"} | {column: sum(row[column] for row in rows) / len(rows) for column in scores}
    lines = [head, "|---|---|---|---|---|---|---|---|---|"]
    for row in [*rows, mean]:
        lines.append(
            f"| {row['task']} | {row['base']:.2f} ({row['base_fair']:.2f}) | {row['fine_tuned']:.2f} | "
            f"{row['t_switch_rms']:.2f} | {row['t_switch_calibrated']:.2f} | {row['bits_per_param']:.3f} | "
            f"{row['times_smaller']:.1f} | {row['served_auto']:.2f} | {row['routed_right']:.2f} |"
        )
    return "\n".join(lines)


TABLES = {"first_table": first_table, "bars": bars_table}


def with_tables(text: str) -> str:
    """A README text with every `<!-- NAME:begin -->` … `<!-- NAME:end -->` filled from the committed results."""
    for name, table in TABLES.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        before, found, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        if found and closed:
            text = f"{before}{begin}\n{table()}\n{end}{after}"
    return text


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.bars", description=__doc__)
    parser.add_argument("--readme", action="store_true", help="rewrite the tables in README.md")
    if parser.parse_args().readme:
        README.write_text(with_tables(README.read_text(encoding="utf-8")), encoding="utf-8")
    print(bars_table())


if __name__ == "__main__":
    main()
