"""A real server on a real port, around the dummy engine; on a thread of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn

from tests.api.house import House, open_house


@contextmanager
def live_server(folder: Path) -> Iterator[str]:
    """Its address, while it runs."""
    with live_house(folder) as (url, _):
        yield url


@contextmanager
def live_house(folder: Path, **settings: Any) -> Iterator[tuple[str, House]]:
    """Its address and the house, whose engine's levers may be moved from here, while it runs."""
    found: list[tuple[str, House]] = []
    ready, end = threading.Event(), threading.Event()

    async def run() -> None:
        async with open_house(folder, **settings) as house:
            listening = uvicorn.Server(uvicorn.Config(house.app, port=0, lifespan="off", log_config=None))
            serving = asyncio.create_task(listening.serve())
            while not listening.started:
                await asyncio.sleep(0.01)
            found.append((f"http://127.0.0.1:{listening.servers[0].sockets[0].getsockname()[1]}", house))
            ready.set()
            await asyncio.to_thread(end.wait)
            listening.should_exit = True
            await serving

    thread = threading.Thread(target=asyncio.run, args=[run()])
    thread.start()
    assert ready.wait(30)
    try:
        yield found[0]
    finally:
        end.set()
        thread.join()
