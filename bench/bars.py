"""Every bar of every committed result in one table: `python -m bench.bars`; `--readme` writes the pages' tables."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
README = ROOT / "README.md"
PAGES = (README, ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "clients.md")
"""What shows results."""


def load(name: str) -> dict[str, Any]:
    """One committed result."""
    result: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return result


def bars_table() -> str:
    """All bars as a Markdown table: what was to be reached, what was measured, and where."""
    return _table([bar for _, result in results() for bar in result.get("bars", [])])


def _table(bars: list[dict[str, Any]]) -> str:
    lines = ["| bar | goal | measured | met |", "|---|---|---|---|"]
    for bar in bars:
        met = "yes" if bar["met"] else "**no**"
        op = {">=": "≥", "<=": "≤"}[bar["op"]]
        lines.append(f"| {bar['what']} | {op} {bar['goal']:g} | {bar['value']:.3g} | {met} |")
    return "\n".join(lines)


def results() -> list[tuple[str, dict[str, Any]]]:
    """Every committed result by the name of its file."""
    return [(path.stem, load(path.stem)) for path in sorted(RESULTS.glob("*.json"))]


def bars_summary() -> str:
    """How many bars are met, and the table of those that are not."""
    bars = [bar for _, result in results() for bar in result.get("bars", [])]
    missed = [bar for bar in bars if not bar["met"]]
    said = f"{len(bars) - len(missed)} of {len(bars)} bars are met"
    return f"{said}.\n" if not missed else f"{said}; those that are not:\n\n{_table(missed)}\n"


def benchmarks() -> str:
    """A section for every committed result: command, machine and bars."""
    sections = []
    for name, result in results():
        machine = result.get("machine", {})
        where = ", ".join(str(machine[key]) for key in ("gpu", "cpu", "torch") if machine.get(key))
        cores = f"{machine['cores']} cores, " if "cores" in machine else ""
        sections.append(
            f"## {name}\n\n`{result['command']}`, {result['date'][:10]}, {cores}{where}: "
            f"[{name}.json](../bench/results/{name}.json)\n"
        )
        if result.get("bars"):
            sections.append(f"{_table(result['bars'])}\n")
    return "\n".join(sections)


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


def clients_table() -> str:
    """How much of `bench.conformance` each client does: one row per client."""
    version, *features = load("conformance")["rows"]
    lines = ["| client | version | works | refused clearly | not offered by it | fails |", "|---|---|---|---|---|---|"]
    for client in [name for name in version if name not in ("feature", "what")]:
        found = [row[client] for row in features]
        counts = [found.count(verdict) for verdict in ("works", "refused", "not offered")]
        cells = [client, version[client], *counts, len(found) - sum(counts)]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def conformance_table() -> str:
    """The rows of `bench.conformance` as a Markdown table: client × feature."""
    version, *features = load("conformance")["rows"]
    clients = [name for name in version if name not in ("feature", "what")]
    head = " | ".join(f"{client} {version[client]}" for client in clients)
    lines = [f"| | {head} |", f"|{'---|' * (len(clients) + 1)}"]
    for row in features:
        cells = " | ".join("—" if row[client] == "not offered" else row[client] for client in clients)
        lines.append(f"| {row['what']} | {cells} |")
    return "\n".join(lines)


def fidelity_table() -> str:
    """The means of `bench.fidelity`, method by size, of as many tasks as are measured, and of how many prompts each."""
    rows = [row for row in load("fidelity")["rows"] if row.get("tasks")]
    names = "method", "bits/param", "× smaller than bf16", "share of the gain kept", "KL, nats/token", "CPU minutes"
    head = f"| {' | '.join(names)} | tasks × prompts |"
    lines = [head, "|---|---|---|---|---|---|---|"]
    for row in sorted(rows, key=lambda row: row["bits_per_param"] or 0.0):
        if row["retention"] is None or row["bits_per_param"] is None:
            continue
        lines.append(
            f"| {row['method']} | {row['bits_per_param']:.3f} | {row['times_smaller']:.0f} | {row['retention']:.3f} | "
            f"{row['kl']:.3f} | {row['cpu_seconds'] / 60:.1f} | {row['tasks']} × {row['prompts']} |"
        )
    return "\n".join(lines)


def second_base_table() -> str:
    """The rows of `bench.second_base`: offline and through the server."""
    head = "| Gemma 3 270M | method | bits/param | × smaller than bf16 | score | served | share of the gain kept |"
    lines = [head, "|---|---|---|---|---|---|---|"]
    for row in load("second_base")["rows"]:
        size = f"{row['bits_per_param']:.3f} | {row['times_smaller']:.0f}" if row.get("bits_per_param") else "|"
        served = f"{row['served']:.2f}" if "served" in row else ""
        lines.append(
            f"| {row['task']} | {row['method']} | {size} | {row['score']:.2f} | {served} | {row['retention']:.2f} |"
        )
    return "\n".join(lines)


def merging_table() -> str:
    """The rows of `bench.merging`: several experts as one, and routed; says so where it has not been run to its end."""
    if not (RESULTS / "merging.json").is_file():
        return "Not measured yet: `python -m bench.merging`.\n"
    rows = load("merging")["rows"]
    tasks = [key for key in rows[0] if key not in ("experts", "mean", "strength")]
    lines = [f"| four experts | strength | {' | '.join(tasks)} | mean |", f"|{'---|' * (len(tasks) + 3)}"]
    for row in rows:
        strength = f"{row['strength']:g}" if "strength" in row else ""
        cells = " | ".join(f"{row[key]:.2f}" for key in [*tasks, "mean"])
        lines.append(f"| {row['experts']} | {strength} | {cells} |")
    return "\n".join(lines)


TABLES = {
    "clients": clients_table,
    "conformance": conformance_table,
    "first_table": first_table,
    "fidelity": fidelity_table,
    "second_base": second_base_table,
    "merging": merging_table,
    "bars": bars_table,
    "bars_summary": bars_summary,
    "benchmarks": benchmarks,
}


def with_tables(text: str) -> str:
    """The text of a page with every `<!-- NAME:begin -->` … `<!-- NAME:end -->` filled from the committed results."""
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
    parser.add_argument("--readme", action="store_true", help="rewrite the tables in README.md and of docs/")
    if parser.parse_args().readme:
        for page in PAGES:
            page.write_text(with_tables(page.read_text(encoding="utf-8")), encoding="utf-8")
    print(bars_table())


if __name__ == "__main__":
    main()
