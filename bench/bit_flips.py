"""Is a flipped bit noticed, wherever it is? `python -m bench.bit_flips`.

Flips random bits, one at a time, in every place where an expert's bytes are kept: a blob of a folder, a file of the
disk cache, a chunk in Redis (a real one), and a buffer in host memory. After each, the expert is loaded as the engine
loads it. What comes out must be exactly what was decoded from the sound file, or a refusal; healed means that the next
load, at the latest after Redis has been put right by the server that has a copy, gives the sound expert again.
"""

from __future__ import annotations

import argparse
import logging
import random
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import torch

from bench import report
from bench.plan import DEMO, demo_manifest
from server.engine.host_tier import HostTier
from server.engine.loader import ExpertLoader
from store.backends import BlobStore
from store.backends.disk import DiskStore
from store.backends.redis import RedisStore
from store.backends.redis_link import DAMAGED, chunk_key
from store.errors import ExpertUnavailableError
from store.expert_file import digest_of
from tests.store.redis_server import RedisServer

CPU = torch.device("cpu")


@dataclass
class Place:
    """Where bits are flipped.

    Attributes:
        flip: flips the bit of that number, modulo what there is.
        load: loads the expert as the engine does, and gives back its buffer.
        faults: damaged copies that have been noticed so far.
        heal: done before the expert is loaded a second time.
    """

    name: str
    flip: Callable[[int], None]
    load: Callable[[], torch.Tensor]
    faults: Callable[[], int]
    heal: Callable[[], None]


def try_out(place: Place, sound: torch.Tensor, flips: int, seed: int) -> dict[str, object]:
    """One row: how many flips were noticed and healed, and how often anything else than the sound expert came out."""
    rng = random.Random(seed)
    noticed = healed = wrong = 0
    for _ in range(flips):
        before = place.faults()
        place.flip(rng.randrange(1 << 40))
        for attempt in range(2):
            try:
                wrong += not torch.equal(place.load(), sound)
            except ExpertUnavailableError:
                if attempt == 0:
                    place.heal()
            else:
                healed += 1
                break
        noticed += place.faults() > before
    return {"place": place.name, "flips": flips, "noticed": noticed, "healed": healed, "wrong_experts": wrong}


def flip_file(path: Path, bit: int) -> None:
    """Flip one bit of a file."""
    path.chmod(0o644)
    with path.open("r+b") as file:
        where = bit // 8 % path.stat().st_size
        file.seek(where)
        byte = file.read(1)[0]
        file.seek(where)
        file.write(bytes([byte ^ 1 << bit % 8]))


def places(folder: Path, redis: RedisServer, source: Path, opened: ExitStack) -> list[Place]:
    """A blob, a cache file, a chunk in Redis, and a buffer in host memory."""
    digest, manifest = digest_of(source), demo_manifest(source)
    disk = opened.enter_context(closing(DiskStore(folder / "disk")))
    holder = opened.enter_context(closing(RedisStore(redis.url, folder / "holder", cache_bytes=1 << 40)))
    reader = opened.enter_context(closing(RedisStore(redis.url, folder / "reader", cache_bytes=1 << 40)))
    for store in (disk, holder):
        _put(store, source, digest)
    host = HostTier(1 << 40)
    hosted = ExpertLoader(manifest, CPU, disk.read, host)

    def load(store: BlobStore) -> torch.Tensor:
        return _buffer(ExpertLoader(manifest, CPU, store.read, HostTier(0)), digest)

    def flip_in_redis(bit: int) -> None:
        reader._cache.drop(digest)
        where = bit // 8 % int(redis.client.strlen(chunk_key(digest, 0)))
        byte = redis.client.getrange(chunk_key(digest, 0), where, where)[0]
        redis.client.setrange(chunk_key(digest, 0), where, bytes([byte ^ 1 << bit % 8]))

    def until_put_back() -> None:
        while redis.client.sismember(DAMAGED, digest):
            time.sleep(0.01)

    def flip_in_memory(bit: int) -> None:
        hosted.evicted(hosted.load(digest))
        with host.reading(digest) as kept:
            assert kept is not None
            kept.buffer[bit // 8 % kept.nbytes] ^= 1 << bit % 8

    return [
        Place(
            "blob of a folder (healed by uploading it again)",
            lambda bit: flip_file(folder / "disk" / "blobs" / digest[:2] / digest, bit),
            lambda: load(disk),
            lambda: disk.tiers()[0].faults,
            lambda: _put(disk, source, digest),
        ),
        Place(
            "file of the disk cache",
            lambda bit: flip_file(folder / "holder" / "blobs" / digest[:2] / digest, bit),
            lambda: load(holder),
            lambda: holder.tiers()[0].faults,
            lambda: None,
        ),
        Place("chunk in Redis", flip_in_redis, lambda: load(reader), lambda: reader.tiers()[1].faults, until_put_back),
        Place(
            "buffer in host memory",
            flip_in_memory,
            lambda: _buffer(hosted, digest),
            lambda: host.stats().faults,
            lambda: None,
        ),
    ]


def _buffer(loader: ExpertLoader, digest: str) -> torch.Tensor:
    parcel = loader.load(digest).parcel
    assert parcel is not None
    return parcel.buffer


def _put(store: BlobStore, source: Path, digest: str) -> None:
    """As an upload does."""
    path = store.quarantine() / "upload"
    shutil.copyfile(source, path)
    store.put_blob(path, digest)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.bit_flips", description=__doc__)
    parser.add_argument("--flips", type=int, default=100, help="in each place")
    parser.add_argument("--quick", action="store_true", help="5 in each place; writes no results")
    given = parser.parse_args()
    source = min(DEMO.glob("*.safetensors"))
    logging.disable(logging.ERROR)  # it would say so of every flip
    with tempfile.TemporaryDirectory(prefix="bench-bit-flips-") as name, ExitStack() as opened:
        redis = RedisServer(Path(name) / "redis")
        opened.callback(redis.close)
        redis.start()
        found = places(Path(name), redis, source, opened)
        sound = found[0].load().clone()
        rows = [try_out(place, sound, 5 if given.quick else given.flips, seed) for seed, place in enumerate(found)]
    flips = sum(int(str(row["flips"])) for row in rows)
    totals = {key: sum(int(str(row[key])) for row in rows) for key in ("noticed", "healed", "wrong_experts")}
    bars = [
        report.bar("flips.noticed", f"share noticed of {flips} flipped bits", totals["noticed"] / flips, ">=", 1),
        report.bar("flips.healed", "share of them that were healed", totals["healed"] / flips, ">=", 1),
        report.bar("flips.wrong", "wrong experts that reached the engine", totals["wrong_experts"], "<=", 0),
    ]
    report.show(rows, bars)
    if not given.quick:
        report.write("bit_flips", shlex.join(["python", "-m", "bench.bit_flips", *sys.argv[1:]]), rows, bars)


if __name__ == "__main__":
    main()
