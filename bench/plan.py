"""Does `switchyard plan` foresee what the tiers do? `python -m bench.plan` replays Zipf traces through the real ones.

Requests, one after the other, go through the engine's own residency, loader, host tier and store, with small expert
files that are really read, checked and decoded. The first half of each trace warms the tiers up, the second is
counted. `apart`: device and host are two memories, as with a GPU (here both are in this machine's). `replicas`: that
many sets of tiers, each request going to the one that `deploy.affinity` prefers. Besides, the rates that plans take as
given: how fast a demo expert is decoded, and how fast what is decoded is checked and copied.
"""

from __future__ import annotations

import argparse
import math
import queue
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from bench import report
from deploy.affinity import Holdings, ranked
from server.engine.host_tier import HostTier
from server.engine.loader import ExpertLoader
from server.engine.residency import Residency
from server.popularity import divided_hit_rate, zipf
from store.backends.disk import DiskStore
from store.bfloat16 import to_bfloat16
from store.errors import SwitchyardError
from store.expert_file import ExpertInfo, digest_of, read_header, tensor_bytes, write_expert
from store.manifest import BaseManifest
from store.mix import Mix
from store.packed import PackedDense

BASE = BaseManifest("0" * 64, {"norm": (256,)})
CPU = torch.device("cpu")
DEMO = Path(__file__).parents[1] / "examples" / "experts"


@dataclass(frozen=True)
class Case:
    """One trace: so many experts of that popularity, and room for so many in the tiers of each replica."""

    experts: int
    exponent: float
    device: int
    host: int = 0
    apart: bool = False
    replicas: int = 1


CASES = (
    Case(200, 0.6, 20),
    Case(200, 1.0, 20),
    Case(200, 1.4, 20),
    Case(1000, 1.0, 50),
    Case(200, 1.0, 20, host=20),
    Case(200, 1.0, 20, host=40),
    Case(200, 1.0, 20, host=60, apart=True),
    Case(200, 1.0, 20, replicas=4),
)


class ApartLoader(ExpertLoader):
    """As on a GPU: what is on the device is a copy of what is in host memory."""

    def __init__(self, read: Callable[[str], bytes], host: HostTier) -> None:
        super().__init__(BASE, CPU, read, host)
        self._in_place = False


class Replica:
    """The tiers of one server, asked for one expert after the other."""

    def __init__(self, store: DiskStore, case: Case, nbytes: int) -> None:
        self._posted: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.host = HostTier(case.host * nbytes)
        loader = ApartLoader(store.read, self.host) if case.apart else ExpertLoader(BASE, CPU, store.read, self.host)
        self.residency = Residency(loader, case.device * nbytes, self._posted.put)

    def ask(self, digest: str) -> None:
        """Have an expert granted, and give it back."""
        mix, granted = Mix.of({digest: 1.0}), []

        def ready(error: SwitchyardError | None) -> None:
            if error is not None:
                raise error
            granted.append(mix)

        self.residency.request(mix, ready)
        while not granted:
            self._posted.get()()
        self.residency.release(mix)

    def counts(self) -> tuple[int, int]:
        """Look-ups that found their expert on the device, and in host memory."""
        return self.residency.stats().hits, self.host.stats().hits


def fill(folder: Path, experts: int) -> tuple[DiskStore, list[str], int]:
    """A store of small experts: itself, their digests, and what each takes in memory."""
    store = DiskStore(folder)
    digests = []
    for i in range(experts):
        path = store.quarantine() / "upload"
        payload = to_bfloat16(np.full(256, i + 1, np.float32)).tobytes()
        write_expert(path, ExpertInfo(codec="raw", tool="bench"), {"norm": PackedDense((256,), payload)}, BASE)
        digest = digest_of(path)
        target = folder / "blobs" / digest[:2] / digest  # as `put_blob`, but not flushed one by one
        target.parent.mkdir(exist_ok=True)
        path.rename(target)
        digests.append(digest)
    return store, digests, ExpertLoader(BASE, CPU, store.read, HostTier(0)).decoded_bytes(digests[0])


def replay(case: Case, requests: int, seed: int) -> tuple[float, float]:
    """Measured shares of requests that found their expert on the device, and in host memory."""
    rng = np.random.default_rng(seed)
    trace = rng.choice(case.experts, size=requests, p=zipf(case.experts, case.exponent))
    with tempfile.TemporaryDirectory(prefix="bench-plan-") as folder:
        store, digests, nbytes = fill(Path(folder), case.experts)
        replicas = {f"replica-{seed}-{i}": Replica(store, case, nbytes) for i in range(case.replicas)}
        cold = {name: Holdings() for name in replicas}
        homes = [replicas[ranked(digest, cold)[0][0]] for digest in digests]
        for i in trace[: requests // 2]:
            homes[i].ask(digests[i])
        before = [replica.counts() for replica in replicas.values()]
        for i in trace[requests // 2 :]:
            homes[i].ask(digests[i])
        after = [replica.counts() for replica in replicas.values()]
        for replica in replicas.values():
            replica.residency.close()
        store.close()
    counted = requests - requests // 2
    device, host = (sum(a[k] - b[k] for a, b in zip(after, before, strict=True)) / counted for k in (0, 1))
    return device, host


def foreseen(case: Case) -> tuple[float, float]:
    """The same two shares as plans have them. On a CPU the two tiers never hold the same expert."""
    shares = zipf(case.experts, case.exponent)
    device = divided_hit_rate(shares, case.device, case.replicas)
    near = divided_hit_rate(shares, case.host if case.apart else case.device + case.host, case.replicas)
    return device, max(0.0, near - device) if case.host else 0.0


def rates(rounds: int) -> dict[str, object]:
    """How fast the demo's largest expert is read, checked and decoded, and a parcel checked and copied."""
    path = max(DEMO.glob("*.safetensors"), key=lambda file: file.stat().st_size)
    data = path.read_bytes()
    manifest = demo_manifest(path)
    parameters = sum(math.prod(shape) for shape in manifest.tensors.values())
    host = HostTier(1 << 40)
    loader = ApartLoader(lambda _: data, host)
    loader._manifest = manifest
    digest = digest_of(path)

    def timed(call: Callable[[], object]) -> float:
        began = time.perf_counter()
        call()
        return time.perf_counter() - began

    cold, warm, nbytes = [], [], 0
    for _ in range(rounds):
        host.drop(digest)
        cold.append(timed(lambda: loader.load(digest)))
        warm.append(timed(lambda: loader.load(digest)))
        nbytes = host.used_bytes
    return {
        "decoded": path.name,
        "parameters": parameters,
        "file_bytes": len(data),
        "resident_bytes": nbytes,
        "decode_params_per_s": parameters / statistics.median(cold),
        "warm_bytes_per_s": nbytes / statistics.median(warm),
        "cold_ms": 1e3 * statistics.median(cold),
        "warm_ms": 1e3 * statistics.median(warm),
    }


def demo_manifest(path: Path) -> BaseManifest:
    """What an expert file tells of its base, which need not be here: how many bits it spends on each parameter."""
    header = read_header(path)
    parameters = round(8 * sum(tensor_bytes(path).values()) / header.bits_per_param)
    shapes = {name: entry.shape for name, entry in header.tensors.items()}
    untouched = parameters - sum(math.prod(shape) for shape in shapes.values())
    return BaseManifest(header.base_fingerprint, shapes | {"untouched": (untouched,)})


def measure(cases: Sequence[Case], requests: int, seeds: int) -> list[dict[str, object]]:
    """One row per case: the means over some traces, beside what was foreseen."""
    rows: list[dict[str, object]] = []
    for case in cases:
        runs = [replay(case, requests, seed) for seed in range(seeds)]
        device, host = (statistics.mean(run[k] for run in runs) for k in (0, 1))
        planned_device, planned_host = foreseen(case)
        rows.append(
            {
                **vars(case),
                "requests": requests,
                "device_hits": device,
                "device_planned": planned_device,
                "host_hits": host,
                "host_planned": planned_host,
                "worst_error": max(abs(device - planned_device), abs(host - planned_host)),
            }
        )
    return rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.plan", description=__doc__)
    parser.add_argument("--requests", type=int, default=12_000, help="of one trace, half of them to warm up")
    parser.add_argument("--seeds", type=int, default=3, help="traces per case")
    parser.add_argument("--quick", action="store_true", help="short traces of every case; writes no results")
    given = parser.parse_args()
    requests, seeds = (2_000, 1) if given.quick else (given.requests, given.seeds)
    rows = measure(CASES, requests, seeds)
    worst = max(float(row["worst_error"]) for row in rows)  # type: ignore[arg-type]
    bars = [report.bar("plan.hits", "hit rates of the tiers, planned against measured: worst error", worst, "<=", 0.02)]
    report.show(rows, bars, title="hit rates")
    decoding = rates(2 if given.quick else 7)
    report.show([decoding], title="what loading costs")
    if not given.quick:
        command = shlex.join(["python", "-m", "bench.plan", *sys.argv[1:]])
        report.write("plan", command, [*rows, decoding], bars)


if __name__ == "__main__":
    main()
