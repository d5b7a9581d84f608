"""`make audit` asks whether any pin has a known hole; here a server of this test answers in osv.dev's place."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.deploy.test_dependencies import ROOT, pinned

HOLE = {
    "id": "PYSEC-2026-1",
    "summary": "a hole",
    "modified": "2026-01-01T00:00:00Z",
    "affected": [
        {
            "package": {"name": "starlette", "ecosystem": "PyPI"},
            "ranges": [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "999"}]}],
        }
    ],
}


@contextmanager
def advisories(holes: dict[str, Any]) -> Iterator[tuple[str, list[str]]]:
    """A database of known holes by package: its address, and whom it was asked about."""
    asked: list[str] = []

    class Answering(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            query = json.loads(self.rfile.read(int(self.headers["content-length"])))
            name = query["package"]["name"]
            asked.append(f"{name}=={query['version']}")
            answer = json.dumps({"vulns": [holes[name]]} if name in holes else {}).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, format: str, *args: object) -> None:
            """Silence."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Answering) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1/query", asked
        server.shutdown()


def audit(url: str) -> subprocess.CompletedProcess[str]:
    """What `make audit` does at the end."""
    arguments = f"ARGS=--osv-url {url} --progress-spinner off"
    make = ["make", "--dry-run", "--no-print-directory", "audit", f"PY={sys.executable}", arguments]
    printed = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    command = shlex.split(printed.splitlines()[-1])
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | {"NO_PROXY": "127.0.0.1"}, capture_output=True, text=True, check=False
    )


def test_every_pin_is_asked_about() -> None:
    with advisories({}) as (url, asked):
        done = audit(url)
    assert done.returncode == 0, done.stderr
    assert sorted(asked) == sorted(f"{name}=={version}" for name, version in pinned().items())


def test_a_known_hole_fails_the_audit() -> None:
    with advisories({"starlette": HOLE}) as (url, _):
        done = audit(url)
    assert done.returncode == 1
    assert ["starlette", str(pinned()["starlette"]), "PYSEC-2026-1", "999"] in [
        line.split() for line in done.stdout.splitlines()
    ]


def test_no_answer_is_not_taken_for_a_clean_one() -> None:
    with advisories({}) as (url, _):
        pass
    assert audit(url).returncode != 0
