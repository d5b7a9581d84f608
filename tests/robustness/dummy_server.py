"""A server in a process of its own, as the product serves, around the dummy engine: `python -m
tests.robustness.dummy_server FOLDER`.

Settings are those of the environment, `SWITCHYARD_*`. It writes its port, and ends when its input does. The engine's
levers are environment variables too: `DUMMY_DELAY` seconds per token, `DUMMY_QUEUE` requests at most, `DUMMY_LENGTH`
tokens of an answer; and `DUMMY_KEY` is the key of the one who publishes its experts.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from server.serving import listening
from tests.api.dummy_engine import DummyEngine
from tests.api.house import CRON, FRENCH, make_expert, open_house

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Running:
    """A server that runs."""

    port: int
    pid: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def resident(self) -> int:
        """Bytes of memory in use."""
        return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def dummy_server(folder: Path, **environment: str) -> Iterator[Running]:
    """Run one."""
    command = [sys.executable, "-m", "tests.robustness.dummy_server", str(folder)]
    with subprocess.Popen(
        command, cwd=ROOT, env=_clean(os.environ) | environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        try:
            yield Running(int(process.stdout.readline()), process.pid)
        finally:
            process.stdin.close()


def _clean(environment: Mapping[str, str]) -> dict[str, str]:
    return {key: value for key, value in environment.items() if not key.startswith("SWITCHYARD_")}


async def serve(folder: Path) -> None:
    """Until the input ends."""
    engine = DummyEngine()
    async with open_house(folder, engine=engine) as house:  # settings come from the environment
        if key := os.environ.get("DUMMY_KEY"):
            house.http.headers["authorization"] = f"Bearer {key}"
        for value, (name, exemplars) in enumerate((("cron", CRON), ("french", FRENCH)), start=1):
            path = make_expert(folder / name, value=value, name=name, exemplars=tuple(exemplars))
            assert (await house.upload(path)).status_code == 201
        engine.delay = float(os.environ.get("DUMMY_DELAY", "0"))
        engine.max_queue = int(os.environ.get("DUMMY_QUEUE", "64"))
        length = int(os.environ.get("DUMMY_LENGTH", "0"))
        if length:
            engine.reply = lambda _: b"x" * length
        config = listening(house.app, house.settings.model_copy(update={"port": 0}))
        config.lifespan = "off"
        server = uvicorn.Server(config)
        serving = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.005)
        os.write(sys.stdout.fileno(), f"{server.servers[0].sockets[0].getsockname()[1]}\n".encode())
        await asyncio.to_thread(sys.stdin.read)
        server.should_exit = True
        await serving


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1])))
