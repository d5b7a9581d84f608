"""A server beyond loopback, guarded from before its first start: keys, a tenant, limits, JSON on its output."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.conftest import ROOT, clean_environment, switchyard
from tests.tiny import save_base

pytestmark = pytest.mark.slow


def key(*words: str, **environment: str) -> str:
    made = switchyard("keys", "create", *words, **environment)
    assert made.returncode == 0, made.stdout + made.stderr
    return next(line for line in made.stdout.splitlines() if line.startswith("sy_"))


def until_ready(url: str, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        assert process.poll() is None, process.stdout.read() if process.stdout else ""
        try:
            if httpx.get(f"{url}/ready").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.2)
    raise AssertionError("the server does not get ready")


def test_a_guarded_server(tmp_path: Path) -> None:
    base, data = save_base(tmp_path / "base"), tmp_path / "data"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--base", base, "--base-name", "tiny", "--data-dir", data, "--cache-dir", tmp_path / "cache",
               "--feature-layer", "2", "--kv-bytes", "8MiB", "--host", "0.0.0.0", "--port", str(port)]  # fmt: skip
    refused = switchyard("serve", *options)
    assert refused.returncode == 1
    assert "without API keys" in refused.stderr
    admin = key("--role", "admin", "--store", str(data))
    command = [sys.executable, "-m", "server.cli", "serve", *map(str, options), "--log-format", "json"]
    process = subprocess.Popen(command, cwd=ROOT, env=clean_environment(), stdout=subprocess.PIPE, text=True)
    url = f"http://127.0.0.1:{port}"
    try:
        until_ready(url, process)
        assert httpx.get(f"{url}/v1/models").status_code == 401
        at = {"SWITCHYARD_SERVER": url, "SWITCHYARD_API_KEY": admin}
        tenant = key("--tenant", "acme", "--role", "infer", "--role", "upload", **at)
        limited = switchyard("tenants", "limit", "acme", "--requests-per-minute", "2", **at)
        assert "2 requests/min" in limited.stdout, limited.stderr
        body = {"model": "tiny", "messages": [{"role": "user", "content": "my-secret"}], "max_tokens": 4}
        asked = [
            httpx.post(f"{url}/v1/chat/completions", json=body, headers=_bearer(tenant), timeout=60) for _ in "123"
        ]
        assert [answer.status_code for answer in asked] == [200, 200, 429]
        figures = httpx.get(f"{url}/metrics", headers=_bearer(admin)).text
        assert "switchyard_queue_seconds_count 2.0" in figures
        view = httpx.get(f"{url}/debug/engine", headers=_bearer(admin)).json()
        assert view["lanes"] == []
        used = switchyard("tenants", "usage", **at)
        assert "acme" in used.stdout, used.stderr
        listed = switchyard("keys", "list", **at)
        assert tenant.split("_")[1] in listed.stdout
        assert switchyard("keys", "revoke", tenant.split("_")[1], "--store", data).returncode == 0
        assert httpx.get(f"{url}/v1/models", headers=_bearer(tenant)).status_code == 401
    finally:
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    lines: list[dict[str, Any]] = [json.loads(line) for line in output.splitlines()]
    assert "ready" in [line["message"] for line in lines]
    chats = [line for line in lines if line.get("route") == "/v1/chat/completions"]
    assert [(line["status"], line["tenant"]) for line in chats] == [(200, "acme"), (200, "acme"), (429, "acme")]
    assert chats[0]["request_id"] == asked[0].headers["x-request-id"]
    for secret in ("my-secret", admin, tenant):
        assert secret not in output
        assert secret not in (data / "audit.jsonl").read_text()
    entries = [json.loads(line) for line in (data / "audit.jsonl").read_text().splitlines()]
    who = [(entry["action"], entry["key"].partition(":")[0]) for entry in entries]
    me = admin.split("_")[1]
    assert who == [("key.create", "cli"), ("key.create", me), ("tenant.limit", me), ("key.revoke", "cli")]


def _bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}
