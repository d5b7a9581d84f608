"""What clients see of a Redis that fails, and of a second server: `python -m bench.redis_faults`.

Two real servers with the demo's base and experts share a real redis-server. While one of them is asked for three
experts, of which its device has room for one, Redis is killed, and then stopped, for half a minute each: counted are
answers, failures, and uploads and how they are refused; timed is how long after its return an upload succeeds. Then
experts are uploaded, replaced and removed on one server, and it is timed how soon the other one knows.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx

from bench import report
from bench.served import serving
from examples.base import packaged_gguf
from tests.store.redis_server import RedisServer

EXPERTS = sorted((report.ROOT / "examples" / "experts").glob("*.safetensors"))
BASES = report.ROOT / ".cache" / "base"
"""Where the converted base is kept."""
DEVICE = "25MB"
"""Room for one expert of the demo, not for two."""


@contextmanager
def traffic(url: str, models: Sequence[str], threads: int = 2) -> Iterator[Counter[int]]:
    """Short requests for the models, one after the other; counts them by status, 0 where the connection broke."""
    seen: Counter[int] = Counter()
    over = threading.Event()

    def run(i: int) -> None:
        while not over.is_set():
            i += 1
            body = {"model": models[i % len(models)], "prompt": "the", "max_tokens": 2, "temperature": 0}
            try:
                status = httpx.post(f"{url}/v1/completions", json=body, timeout=120).status_code
            except httpx.HTTPError:
                status = 0
            seen[status] += 1

    workers = [threading.Thread(target=run, args=(i,)) for i in range(threads)]
    for worker in workers:
        worker.start()
    try:
        yield seen
    finally:
        over.set()
        for worker in workers:
            worker.join()


def upload(url: str, file: Path, name: str, *, replace: bool = False) -> httpx.Response:
    """Publish an expert file under a name."""
    files = {"file": file.read_bytes()}
    if replace:
        return httpx.put(f"{url}/v1/experts/{name}", files=files, timeout=120)
    return httpx.post(f"{url}/v1/experts", files=files, data={"name": name}, timeout=120)


def outage(url: str, redis: RedisServer, local: Sequence[str], seconds: float, *, hangs: bool) -> dict[str, object]:
    """One row: what happened while Redis was away, and until an upload succeeded again."""
    refused: Counter[int] = Counter()
    told = 0
    with traffic(url, local) as seen:
        (redis.pause if hangs else redis.kill)()
        began = time.monotonic()
        while time.monotonic() < began + seconds:
            response = upload(url, EXPERTS[-1], "late")
            refused[response.status_code] += 1
            told += "retry-after" in response.headers
            time.sleep(0.5)
        during = seen.copy()
        (redis.resume if hangs else redis.start)()
        back = time.monotonic()
        while upload(url, EXPERTS[-1], "late").status_code not in (200, 201):
            time.sleep(0.05)
        recovered = time.monotonic() - back
    httpx.delete(f"{url}/v1/experts/late", timeout=60).raise_for_status()
    return {
        "fault": "hangs" if hangs else "killed",
        "seconds": seconds,
        "answered_meanwhile": during[200],
        "failed": seen.total() - seen[200],
        "uploads_refused_503": refused[503],
        "with_retry_after": told,
        "uploads_otherwise": refused.total() - refused[503],
        "recovered_s": recovered,
    }


def seen_after(change: Callable[[], httpx.Response], known: Callable[[], bool]) -> float:
    """Seconds from the answer to a change until the other server has said that it knows: one question at the least."""
    change().raise_for_status()
    began = time.monotonic()
    while not known():
        time.sleep(0.002)
    return time.monotonic() - began


def followed(here: str, there: str, rounds: int) -> list[dict[str, object]]:
    """One row per kind of change: how soon the other server knows."""
    first, second = EXPERTS[0], EXPERTS[1]
    times: dict[str, list[float]] = {"upload": [], "replacement": [], "removal": []}

    def digest() -> str | None:
        answer = httpx.get(f"{there}/v1/experts/shared", timeout=60)
        found: str | None = answer.json().get("digest") if answer.status_code == 200 else None
        return found

    for _ in range(rounds):
        times["upload"].append(seen_after(lambda: upload(here, first, "shared"), lambda: digest() is not None))
        old = digest()
        replace = lambda: upload(here, second, "shared", replace=True)  # noqa: E731
        times["replacement"].append(seen_after(replace, lambda old=old: digest() != old))  # type: ignore[misc]
        remove = lambda: httpx.delete(f"{here}/v1/experts/shared", timeout=60)  # noqa: E731
        times["removal"].append(seen_after(remove, lambda: digest() is None))
    return [
        {
            "change": change,
            "rounds": rounds,
            "median_ms": 1e3 * statistics.median(seconds),
            "worst_ms": 1e3 * max(seconds),
        }
        for change, seconds in times.items()
    ]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.redis_faults", description=__doc__)
    parser.add_argument("--seconds", type=float, default=30.0, help="of each outage")
    parser.add_argument("--rounds", type=int, default=20, help="changes of each kind")
    parser.add_argument("--quick", action="store_true", help="3 s and 3 rounds; writes no results")
    given = parser.parse_args()
    seconds, rounds = (3.0, 3) if given.quick else (given.seconds, given.rounds)
    local = ("first", "second", "third")
    with tempfile.TemporaryDirectory(prefix="bench-redis-faults-") as name, ExitStack() as opened:
        folder = Path(name)
        redis = RedisServer(folder / "redis")
        opened.callback(redis.close)
        redis.start()

        def start(which: str) -> str:
            cache = folder / which / "cache"
            cache.mkdir(parents=True)
            BASES.mkdir(parents=True, exist_ok=True)
            (cache / "base").symlink_to(BASES)
            return opened.enter_context(
                serving(
                    "--base", packaged_gguf(), "--base-name", "base", "--store", redis.url, "--cache-dir", cache,
                    "--data-dir", folder / which / "data", "--kv-bytes", "256MB", "--expert-bytes", DEVICE,
                )
            )  # fmt: skip

        here, there = start("here"), start("there")
        for model, file in zip(local, EXPERTS, strict=False):
            upload(here, file, model).raise_for_status()
        faults = [outage(here, redis, local, seconds, hangs=hangs) for hangs in (False, True)]
        changes = followed(here, there, rounds)
    failed = sum(int(str(row["failed"])) for row in faults)
    answered = sum(int(str(row["answered_meanwhile"])) for row in faults)
    untold = sum(int(str(row["uploads_refused_503"])) - int(str(row["with_retry_after"])) for row in faults)
    worst = max(float(str(row["worst_ms"])) for row in changes)
    bars = [
        report.bar("redis.failed", f"failed requests for local experts in outages, of {answered}", failed, "<=", 0),
        report.bar("redis.untold", "uploads refused without Retry-After in outages", untold, "<=", 0),
        report.bar("redis.followed", "until the other server knows of a change, worst (s)", worst / 1e3, "<=", 1),
    ]
    report.show(faults, title="Redis fails")
    report.show(changes, bars, title="the other server follows")
    if not given.quick:
        command = shlex.join(["python", "-m", "bench.redis_faults", *sys.argv[1:]])
        report.write("redis_faults", command, [*faults, *changes], bars)


if __name__ == "__main__":
    main()
