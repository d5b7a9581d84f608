"""More clients at once than the server has room for: refused politely, and whoever is let in gets a whole answer."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from tests.robustness.crowd import crowd, make_room
from tests.robustness.dummy_server import dummy_server

TOKENS = 20


@pytest.mark.parametrize("clients", [200, pytest.param(1000, marks=pytest.mark.slow)])
def test_only_429_and_503_beyond_what_there_is_room_for(tmp_path: Path, clients: int) -> None:
    make_room(clients)
    room = clients // 4
    levers = {"DUMMY_QUEUE": str(room), "DUMMY_LENGTH": str(TOKENS), "DUMMY_DELAY": "0.05"}
    with dummy_server(tmp_path, SWITCHYARD_MAX_REQUESTS=str(clients // 2), **levers) as server:
        before = server.resident
        seen = asyncio.run(asyncio.wait_for(crowd(server.port, clients, TOKENS), 300))
        assert seen.statuses.total() == clients
        assert set(seen.statuses) <= {200, 429, 503}, seen
        assert seen.statuses[200] >= room
        assert (seen.incomplete, seen.no_retry) == (0, 0)
        assert server.resident < before + (100 << 20)
        assert httpx.get(f"{server.url}/health", timeout=60).status_code == 200


def test_probes_and_figures_are_let_in_while_the_server_is_full(tmp_path: Path) -> None:
    with dummy_server(tmp_path, SWITCHYARD_MAX_REQUESTS="1", DUMMY_DELAY="3600") as server:
        body = {"model": "dummy-base", "prompt": "hello", "max_tokens": 1}
        with ThreadPoolExecutor(1) as pool, httpx.Client(base_url=server.url, timeout=60) as http:
            waiting = pool.submit(_ask_and_leave, server.url, body)
            while (refused := http.get("/version")).status_code == 200:
                time.sleep(0.01)
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
            assert refused.json()["error"]["code"] == "too_many_requests"
            for path in ("/health", "/ready", "/metrics", "/debug/engine"):
                assert http.get(path).status_code == 200
            waiting.result()


def _ask_and_leave(url: str, body: dict[str, object]) -> None:
    with suppress(httpx.TimeoutException):
        httpx.post(f"{url}/v1/completions", json=body, timeout=5)
