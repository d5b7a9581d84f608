"""Servers on one Redis, experts of a tiny base, and traffic: what the tests of outages and replicas work with."""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

from server.engine.host_tier import HostTier
from server.engine.loader import ExpertLoader
from store.expert_file import read_header
from store.fingerprint import manifest_of
from tests.e2e.conftest import ServerProcess, start_server
from tests.engine.conftest import Library
from tests.store.redis_server import RedisServer


def start_replica(library: Library, redis: RedisServer, folder: Path, *more: str | Path) -> ServerProcess:
    """A whole server over a Redis, with folders of its own."""
    return start_server(
        "--base", library.base, "--base-name", "tiny", "--store", redis.url, "--data-dir", folder / "data",
        "--cache-dir", folder / "cache", "--feature-layer", "2", "--kv-bytes", "8MiB", *more,
    )  # fmt: skip


def decoded_bytes(library: Library, digest: str) -> int:
    """What one expert takes on the device."""
    import torch

    loader = ExpertLoader(manifest_of(library.base, None), torch.device("cpu"), library.read, HostTier(0))
    return loader.decoded_bytes(digest)


def upload(url: str, library: Library, digest: str, name: str, *, replace: bool = False) -> httpx.Response:
    """Publish an expert file under a name."""
    assert read_header(library.files[digest]).base_fingerprint
    files = {"file": library.files[digest].read_bytes()}
    if replace:
        return httpx.put(f"{url}/v1/experts/{name}", files=files, timeout=60)
    return httpx.post(f"{url}/v1/experts", files=files, data={"name": name}, timeout=60)


def ask(url: str, model: str, *, tokens: int = 4) -> httpx.Response:
    """A short greedy answer of an expert."""
    body = {"model": model, "prompt": "the river", "temperature": 0, "max_tokens": tokens}
    return httpx.post(f"{url}/v1/completions", json=body, timeout=60)


def answer(url: str, model: str) -> tuple[str, str]:
    """The text of such an answer, and the digest that gave it."""
    response = ask(url, model, tokens=12).raise_for_status().json()
    [part] = response["usage"]["switchyard"]["mix"]
    return response["choices"][0]["text"], part["digest"]


def metrics(url: str) -> dict[str, float]:
    """Every figure of /metrics, labels behind `|`."""
    families = text_string_to_metric_families(httpx.get(f"{url}/metrics", timeout=60).text)
    return {
        "|".join([sample.name, *sample.labels.values()]): sample.value
        for family in families
        for sample in family.samples
    }


def eventually(what: Callable[[], object], seconds: float = 30.0) -> None:
    """Wait until something has come about."""
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.02)


@contextmanager
def traffic(url: str, models: Sequence[str], threads: int = 3) -> Iterator[Counter[int]]:
    """Requests for the models, one after the other in each of some threads; counts the answers by status.

    A connection that breaks counts as status 0.
    """
    seen: Counter[int] = Counter()
    stop = threading.Event()

    def run(shift: int) -> None:
        for model in itertools.islice(itertools.cycle(models), shift, None):
            if stop.is_set():
                return
            try:
                status = ask(url, model).status_code
            except httpx.HTTPError:
                status = 0
            seen[status] += 1

    workers = [threading.Thread(target=run, args=(shift,)) for shift in range(threads)]
    for worker in workers:
        worker.start()
    try:
        yield seen
    finally:
        stop.set()
        for worker in workers:
            worker.join()
