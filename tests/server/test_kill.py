"""Kill a server at any instant while clients upload, replace, delete and run jobs: nothing acknowledged is lost."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from store.backends.disk import DiskStore
from store.expert_file import digest_of
from store.registry import Registry
from store.upkeep import verify
from tests.api.dummy_engine import MANIFEST
from tests.api.house import make_expert

ROOT = Path(__file__).parents[2]
PIECE = {"content-type": "application/offset+octet-stream"}


class Customer(threading.Thread):
    """Changes the expert of one name, time and again, and notes what was acknowledged."""

    def __init__(self, name: str, files: dict[str, bytes], seed: int) -> None:
        super().__init__(name=name, daemon=True)
        self.files = files
        self.rng = random.Random(seed)
        self.acknowledged = "-"
        self.tried: set[str] = set()
        self.changes = self.resumed = self.made = 0
        self.fault: BaseException | None = None
        self.url = ""
        self.over = False
        self.idle, self.open = threading.Event(), threading.Event()
        self.idle.set()
        self.upload: tuple[str, str, int] | None = None
        """What is being uploaded in pieces: which file, where, and how much of it was acknowledged."""
        self.job: tuple[str, str] | None = None
        """What a job makes, and where it is."""

    def run(self) -> None:
        while self.open.wait() and not self.over:
            try:
                with httpx.Client(base_url=self.url, timeout=30) as http:
                    while True:
                        self.change(http)
            except httpx.TransportError:  # the server was killed
                self.open.clear()
                self.idle.set()
            except BaseException as fault:
                self.fault = fault
                self.open.clear()
                self.idle.set()
                return

    def change(self, http: httpx.Client) -> None:
        """One change at random. Whatever it raises, `tried` says what may have happened."""
        if self.job is not None:
            self.wait_for_job(http, *self.job)
        elif self.upload is not None or self.rng.random() < 0.5:
            self.in_pieces(http)
        elif self.acknowledged != "-" and self.rng.random() < 0.5:
            self.try_(lambda: http.delete(f"/v1/experts/{self.name}"), "-")
        else:
            digest, data = self.rng.choice(sorted(self.files.items()))
            self.try_(lambda: http.put(f"/v1/experts/{self.name}", files={"file": ("e", data)}), digest)

    def in_pieces(self, http: httpx.Client) -> None:
        if self.upload is None:
            digest, data = self.rng.choice(sorted(self.files.items()))
            body = {"filename": f"{self.name}.safetensors", "bytes": len(data), "sha256": digest}
            answer = http.post("/v1/uploads", json=body)
            assert answer.status_code in (200, 201), answer.text
            self.upload = digest, f"/v1/uploads/{answer.json()['id']}", answer.json()["offset"]
        digest, at, acknowledged = self.upload
        head = http.head(at)
        if head.status_code == 404:
            self.upload = None
            jobs = [job for job in http.get("/v1/jobs").json()["data"] if job["name"] == self.name]
            under_way = jobs and jobs[0]["status"] in ("queued", "running")
            if under_way or self.acknowledged != digest:
                assert jobs, "only what was published or accepted as a job may be gone"
                self.job = digest, f"/v1/jobs/{jobs[0]['id']}"
            return
        offset = int(head.headers["upload-offset"])
        assert offset >= acknowledged, "what was acknowledged is there"
        self.resumed += offset > 0
        data = self.files[digest]
        while offset < len(data):
            piece = data[offset : offset + self.rng.randrange(1, len(data))]
            answer = http.patch(at, content=piece, headers=PIECE | {"upload-offset": str(offset)})
            assert answer.status_code == 204, answer.text
            offset += len(piece)
            self.upload = digest, at, offset
        upload = at.rpartition("/")[2]
        if self.rng.random() < 0.3:
            self.tried.add(digest)
            body = {"uploads": [upload], "name": self.name, "replace": True, "description": "fine"}
            answer = http.post("/v1/jobs", json=body)
            assert answer.status_code == 202, answer.text
            self.job = digest, answer.headers["location"]
        else:
            self.try_(lambda: http.put(f"/v1/experts/{self.name}", json={"upload": upload}), digest)
        self.upload = None

    def wait_for_job(self, http: httpx.Client, digest: str, at: str) -> None:
        """A job that was accepted is there until it has ended, one way or the other."""
        self.tried.add(digest)
        while (job := http.get(at).json())["status"] in ("queued", "running"):
            time.sleep(0.01)
        if job["status"] == "succeeded":
            assert job["expert"] == {"id": self.name, "digest": digest}
            self.acknowledged, self.tried = digest, set()
            self.changes += 1
            self.made += 1
        else:
            assert job["error"]["code"] == "interrupted", job
            there = http.get(f"/v1/experts/{self.name}")
            assert there.status_code == 404 or there.json()["digest"] in {self.acknowledged, digest}
            self.acknowledged, self.tried = there.json().get("digest", "-"), set()
        self.job = None

    def try_(self, call: object, what: str) -> None:
        self.tried.add(what)
        assert callable(call)
        answer = call()
        assert answer.status_code in (200, 201), answer.text
        self.acknowledged, self.tried = what, set()
        self.changes += 1


@contextmanager
def killable(folder: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "tests.server.serve_forever", str(folder)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, text=True, bufsize=1
    ) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


@pytest.mark.parametrize("kills", [6, pytest.param(200, marks=pytest.mark.slow)])
def test_kill_minus_nine_at_any_instant(tmp_path: Path, kills: int) -> None:
    files = {}
    for value in range(1, 4):
        path = make_expert(tmp_path / f"e{value}", value=value, exemplars=("x" * 5000, f"exemplar {value}"))
        files[digest_of(path)] = path.read_bytes()
    rng = random.Random(kills)
    customers = [Customer(f"expert-{i}", files, seed) for i, seed in enumerate(rng.sample(range(1000), 3))]
    for customer in customers:
        customer.start()
    with killable(tmp_path) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for kill in range(kills):
            process.stdin.write("\n")
            child = int(process.stdout.readline())
            try:
                if kill % 4:  # else while it starts
                    url = f"http://127.0.0.1:{int(process.stdout.readline())}"
                    done = sum(customer.changes for customer in customers) + rng.randrange(4)
                    for customer in customers:
                        customer.url = url
                        customer.idle.clear()
                        customer.open.set()
                    until(customers, done)
                time.sleep(rng.uniform(0.0, 0.03))
            finally:
                os.kill(child, signal.SIGKILL)
            said = process.stdout.readline()
            if not kill % 4 and int(said) > 0:  # it had got as far as to tell its port
                said = process.stdout.readline()
            assert int(said) == -signal.SIGKILL
            for customer in customers:
                assert customer.idle.wait(60)
                if customer.fault is not None:
                    raise customer.fault
            check(tmp_path / "data", customers)
    assert sum(customer.changes for customer in customers) > kills / 2
    if kills >= 100:  # a few kills may all miss the instants that these take
        assert sum(customer.made for customer in customers), "some job has come to its end"
        assert sum(customer.resumed for customer in customers) > kills / 10, "uploads were resumed"
    for customer in customers:
        customer.over = True
        customer.open.set()


def until(customers: list[Customer], done: int) -> None:
    """Wait for so many changes."""
    deadline = time.monotonic() + 60
    while sum(customer.changes for customer in customers) < done and not any(c.fault for c in customers):
        assert time.monotonic() < deadline, "nothing happens"
        time.sleep(0.001)


def check(folder: Path, customers: list[Customer]) -> None:
    """What the killed server has left behind."""
    store = DiskStore(folder)
    assert [path.name for path in (folder / "quarantine").iterdir()] == [store.quarantine().name]
    registry = Registry(store, MANIFEST, frozenset())
    records = {record.name: record for record in registry.list()}
    for customer in customers:
        there = records[customer.name].digest if customer.name in records else "-"
        assert there in {customer.acknowledged, *customer.tried}, f"{customer.name} is not what was acknowledged"
        # What a job may still make of it is open.
        pending = customer.job or customer.upload
        customer.acknowledged, customer.tried = there, {pending[0]} if pending else set()
    faults = [finding for finding in verify(store) if finding.verdict.is_fault]
    assert not faults
    store.close()
