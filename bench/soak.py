"""Half an hour of everything at once: `python -m bench.soak --minutes 30`.

A real server on a tiny base is asked by several clients for chats and completions, whole and streamed, of experts by
name, of mixes and by routing; many break off. Meanwhile experts are published, replaced, rolled back and deleted, and
the device has room for a few of them. Every greedy answer is compared, token for token, with transformers' own on the
offline-merged model of the very version that answered, which must be one that the name may have meant. The server's
memory, files and threads are sampled. In the end it must be idle, its counters must agree, and the base's weights
must have the hash they had at the start.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
from transformers.utils.logging import disable_progress_bar

from bench import report
from bench.served import serving_process
from bench.soak_oracle import Oracle
from bench.soak_traffic import BASE, Asker, Changer, Record, Scene

NAMES = [f"expert-{i}" for i in range(6)]
EXPERTS = 12
DEVICE_EXPERTS, HOST_EXPERTS = 3, 2
"""How many decoded experts each tier has room for: fewer than there are."""
WARM_UP = 1 / 3
"""The share of the time after which memory must no longer grow: caches fill at first."""
_SAMPLES = 400
_MINUTES_OF_A_SLOPE = 5.0
"""Memory that is measured for less long tells nothing of leaks."""
_PATIENCE = 120.0
DECODED = 38_000
"""What an expert takes, decoded, or a little more."""
_MIB = 1 << 20


class Gauge(threading.Thread):
    """Samples of a process: seconds since the start, resident bytes, open files, threads."""

    def __init__(self, pid: int, pause: float, over: threading.Event) -> None:
        super().__init__(daemon=True)
        self._proc = Path("/proc") / str(pid)
        self._pause, self._over = pause, over
        self.samples: list[tuple[float, int, int, int]] = []

    def run(self) -> None:
        began = time.monotonic()
        while not self._over.wait(self._pause):
            status = dict(line.split(":", 1) for line in (self._proc / "status").read_text().splitlines())
            resident = int(status["VmRSS"].split()[0]) * 1024
            files = len(list((self._proc / "fd").iterdir()))
            self.samples.append((time.monotonic() - began, resident, files, int(status["Threads"])))

    def late(self) -> npt.NDArray[np.float64]:
        """The samples after the warm-up, `[n, 4]`."""
        end = self.samples[-1][0]
        return np.array([sample for sample in self.samples if sample[0] >= end * WARM_UP], dtype=np.float64)

    def slope(self) -> float:
        """Growth of the resident memory after the warm-up in MiB per minute: the median over all pairs of samples.

        A leak grows between most of them (Theil–Sen); what is used for the first time makes a single step.
        """
        late = self.late()
        earlier, later = np.triu_indices(len(late), k=1)
        grown = (late[later, 1] - late[earlier, 1]) / _MIB
        return float(np.median(grown / (late[later, 0] - late[earlier, 0]) * 60))


def soak(
    minutes: float, clients: int, seed: int, mode: str = "auto", log: Path | None = None
) -> tuple[list[dict[str, Any]], list[report.Bar]]:
    """Run it; rows and bars of the report."""
    with tempfile.TemporaryDirectory() as scratch:
        oracle = Oracle(Path(scratch) / "oracle", EXPERTS)
        with serving_process(*_options(oracle, Path(scratch), mode), log=log) as (url, pid):
            scene = Scene(url, oracle, NAMES)
            changer = Changer(scene, seed)
            changer.publish_all()
            hash_before = _look(url)["base_sha256"]
            gauge = Gauge(pid, max(0.2, 60 * minutes / _SAMPLES), scene.over)
            askers = [Asker(scene, seed + 1 + i) for i in range(clients)]
            judge = Judge(oracle, scene.record)
            for thread in (gauge, judge, changer, *askers):
                thread.start()
            time.sleep(60 * minutes)
            _end(scene, [gauge, changer, *askers])
            scene.record.heard.put(None)
            judge.join()
            seen = _idle(url)
    rows = _rows(minutes, scene.record, judge, gauge, seen)
    return rows, _bars(minutes, scene.record, judge, gauge, seen, hash_before)


def _end(scene: Scene, threads: Sequence[threading.Thread]) -> None:
    """Let all of them end; one that has died before, or does not end, has not done its part."""
    for thread in threads:
        if not thread.is_alive():
            scene.record.fail(f"{type(thread).__name__} had ended before its time")
    scene.over.set()
    for thread in threads:
        thread.join(150)
        if thread.is_alive():
            scene.record.fail(f"{type(thread).__name__} did not end")


class Judge(threading.Thread):
    """Compares what was heard with the oracle, as it comes."""

    def __init__(self, oracle: Oracle, record: Record) -> None:
        super().__init__(daemon=True)
        self._oracle, self._record = oracle, record
        self.verdicts: Counter[str] = Counter()

    def run(self) -> None:
        while (heard := self._record.heard.get()) is not None:
            found = self._oracle.judge(heard.mix, heard.prompt, heard.max_tokens, heard.text, heard.pieces)
            self.verdicts[found.word] += 1
            if found.word == "wrong":
                told = f"{heard.text!r} instead of {found.expected!r}, {heard.max_tokens} tokens of {heard.mix}"
                self._record.fail(f"a wrong answer: {told}")


def disagreements(seen: Mapping[str, Any]) -> list[str]:
    """What an idle engine's own figures must say of each other, and do not."""
    stats = seen["stats"]
    found = [f"{what} is {stats[what]}" for what in ("running", "waiting", "kv_bytes_used") if stats[what]]
    found += [f"{expert['digest'][:12]} is in use" for expert in seen["experts"] if expert["used_by"]]
    found += [f"a mix waits: {waiting['mix']}" for waiting in seen["waiting_for_experts"]]
    for tier in stats["tiers"]:
        if tier["used_bytes"] > tier["limit_bytes"]:
            found.append(f"{tier['tier']} holds more than it may")
        if tier["loads"] - tier["evictions"] < tier["experts"]:
            found.append(f"{tier['tier']} holds experts that it has not loaded")
        if tier["faults"]:
            found.append(f"{tier['tier']} has seen {tier['faults']} damaged copies")
    device = next(tier for tier in stats["tiers"] if tier["tier"] == "device")
    if (device["experts"], device["used_bytes"]) != (
        len(seen["experts"]),
        sum(expert["bytes"] for expert in seen["experts"]),
    ):
        found.append("the device's counts are not those of its experts")
    return found


def _options(oracle: Oracle, scratch: Path, mode: str) -> list[str | Path]:
    return [
        *("--base", oracle.library.base, "--base-name", BASE, "--data-dir", scratch / "data"),
        *("--cache-dir", scratch / "cache", "--feature-layer", "2", "--kv-bytes", "300KiB", "--gc-grace", "20"),
        *("--expert-bytes", str(DEVICE_EXPERTS * DECODED), "--host-expert-bytes", str(HOST_EXPERTS * DECODED)),
        *("--threads", "1", "--mode", mode),
    ]


def _look(url: str) -> dict[str, Any]:
    """The engine's view of itself."""
    answer = httpx.get(f"{url}/debug/engine?hash=true", timeout=_PATIENCE)
    if answer.is_error:
        raise RuntimeError(f"the engine does not tell how it is: {answer.text}")
    seen: dict[str, Any] = answer.json()
    return seen


def _idle(url: str) -> dict[str, Any]:
    """The engine's view of itself once it has nothing to do, or after a while."""
    deadline = time.monotonic() + _PATIENCE
    while disagreements(seen := _look(url)) and time.monotonic() < deadline:
        time.sleep(0.5)
    return seen


def _rows(minutes: float, record: Record, judge: Judge, gauge: Gauge, seen: Mapping[str, Any]) -> list[dict[str, Any]]:
    resident = [sample[1] / _MIB for sample in gauge.samples]
    tiers = {tier["tier"]: tier for tier in seen["stats"]["tiers"]}
    traffic = {what: count for what, count in sorted(record.counts.items()) if what != "failures"}
    rows: list[dict[str, Any]] = [{"what": what, "value": count} for what, count in traffic.items()]
    rows += [{"what": f"greedy answers that are {word}", "value": n} for word, n in sorted(judge.verdicts.items())]
    rows += [
        {"what": f"{name} of the {tier} tier", "value": tiers[tier][name]}
        for tier in tiers
        for name in ("hits", "misses", "loads", "evictions", "faults")
    ]
    rows += [
        {"what": f"{name} of the engine", "value": seen["stats"][name]}
        for name in ("steps", "generated_tokens", "mix_switches", "patches", "mode_changes", "preemptions")
    ]
    return [
        {"what": "minutes", "value": minutes},
        *rows,
        {"what": "MiB resident at first, at most, in the end", "value": _three(resident)},
        {"what": "open files at first, at most, in the end", "value": _three([s[2] for s in gauge.samples])},
        {"what": "threads at first, at most, in the end", "value": _three([s[3] for s in gauge.samples])},
        {"what": "resident MiB over time", "value": [round(at, 1) for at in resident[:: len(resident) // 30 + 1]]},
        {"what": "threads over time", "value": [s[3] for s in gauge.samples[:: len(resident) // 30 + 1]]},
        {"what": "what went wrong", "value": [*record.failures, *disagreements(seen)]},
    ]


def _bars(
    minutes: float, record: Record, judge: Judge, gauge: Gauge, seen: Mapping[str, Any], hash_before: str
) -> list[report.Bar]:
    figures = (
        ("wrong", "wrong answers", judge.verdicts["wrong"]),
        ("failures", "requests that failed as they must not", record.counts["failures"]),
        ("base", "changes of the base's hash", int(seen["base_sha256"] != hash_before)),
        ("counters", "counters that disagree, once idle", len(disagreements(seen))),
    )
    compared = judge.verdicts.total()
    bars = [report.bar("soak-compared", "soak: greedy answers compared", compared, ">=", 100 * minutes)]
    bars += [report.bar(f"soak-{name}", f"soak: {what}", value, "<=", 0) for name, what, value in figures]
    if minutes >= _MINUTES_OF_A_SLOPE:
        files = gauge.late()[:, 2]
        grown = float(np.median(files[len(files) // 2 :]) - np.median(files[: len(files) // 2]))
        bars += [
            report.bar("soak-memory", "soak: growth of resident memory, MiB a minute", gauge.slope(), "<=", 0.1),
            report.bar("soak-files", "soak: open files more in the last third", grown, "<=", 0.0),
        ]
    return bars


def _three(values: Sequence[float]) -> list[float]:
    return [round(value, 1) for value in (values[0], max(values), values[-1])]


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--clients", type=int, default=6, help="how many ask at a time")
    parser.add_argument("--seed", type=int, default=0, help="of the traffic")
    parser.add_argument("--mode", choices=("auto", "merged", "mixed"), default="auto", help="of the server")
    parser.add_argument("--log", type=Path, help="file for what the server says")
    parser.add_argument("--out", type=Path, default=report.RESULTS, help="folder of the result")
    given = parser.parse_args()
    disable_progress_bar()  # type: ignore[no-untyped-call]
    rows, bars = soak(given.minutes, given.clients, given.seed, given.mode, given.log)
    command = f"python -m bench.soak {shlex.join(sys.argv[1:])}".rstrip()
    report.write("soak", command, rows, bars, folder=given.out)
    report.show(rows, bars, title="soak")
    return 0 if all(bar["met"] for bar in bars) else 1


if __name__ == "__main__":
    sys.exit(main())
