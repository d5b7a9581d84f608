"""Do the clients that people have work, unmodified, against a live server? `python -m bench.conformance`.

Starts a server with a key around a tiny base that is made on the spot, or around `--base` with `--experts`; runs every
client of `bench.clients` in a process of its own, which cannot reach beyond this machine; prints which feature works,
is refused clearly, or is not offered by the client; and writes `bench/results/conformance.json`.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.clients.features import FEATURES, Feature
from bench.clients.run import CLIENTS, check, version_of
from bench.clients.world import live, make_tiny
from bench.report import Row, bar, show, write

WORKS, REFUSED, NOT_OFFERED, FAILS = "works", "refused", "not offered", "FAILS"
Found = Mapping[str, Mapping[str, str | None]]
"""Client → feature → what went wrong, or None."""


def verdict(feature: Feature, found: Mapping[str, str | None]) -> str:
    """What became of a feature with one client."""
    if feature.id not in found:
        return NOT_OFFERED
    if (error := found[feature.id]) is not None:
        return f"{FAILS}: {error}"
    return REFUSED if feature.refused else WORKS


def rows_of(found: Found) -> list[Row]:
    """The matrix: a row per feature, a column per client; the first row tells the clients' versions."""
    rows: list[Row] = [{"feature": "version", "what": "version"} | {client: version_of(client) for client in found}]
    for feature in FEATURES:
        verdicts = {client: verdict(feature, outcomes) for client, outcomes in found.items()}
        rows.append({"feature": feature.id, "what": feature.what} | verdicts)
    return rows


def run(clients: Sequence[str], base: str | None, experts: Path | None) -> Found:
    """Check clients one after the other."""
    found: dict[str, Mapping[str, str | None]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        given: Sequence[str | Path] = () if base is None or experts is None else ("--base", base, "--experts", experts)
        with live(folder, given or make_tiny(folder)) as target:
            for client in clients:
                began = time.monotonic()
                found[client] = check(client, target)
                print(f"{client}: {len(found[client])} features in {time.monotonic() - began:.0f} s", file=sys.stderr)
    return found


def main() -> None:
    """Command line; status 1 if anything fails."""
    parser = argparse.ArgumentParser(prog="python -m bench.conformance", description=__doc__.splitlines()[0])
    parser.add_argument("--base", help="a base of yours in place of the tiny one: a folder, a GGUF file or a hub id")
    parser.add_argument("--experts", type=Path, help="a folder with expert files of that base, at least two")
    parser.add_argument("--client", action="append", choices=CLIENTS, help="only this one; nothing is written then")
    given = parser.parse_args()
    if (given.base is None) != (given.experts is None):
        parser.error("--base and --experts go together")
    rows = rows_of(run(given.client or list(CLIENTS), given.base, given.experts))
    cells = [str(value) for row in rows for name, value in row.items() if name not in ("feature", "what")]
    failed = sum(cell.startswith(FAILS) for cell in cells)
    done = sum(cell in (WORKS, REFUSED) for cell in cells)
    what = f"features that fail, of {done + failed} in {len(rows[0]) - 2} clients"
    bars = [bar("conformance_failed", what, failed, "<=", 0)]
    show([{name: value for name, value in row.items() if name != "feature"} for row in rows], bars)
    if given.client is None:
        print(write("conformance", shlex.join(["python", "-m", "bench.conformance", *sys.argv[1:]]), rows, bars))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
