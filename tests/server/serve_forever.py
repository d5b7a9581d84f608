"""A server that is killed again and again: `python -m tests.server.serve_forever FOLDER`.

For every line on its input this forks a child that serves FOLDER on a port of its own, and answers with the child's
process id; the child then writes its port. Once it is dead, its status follows. Forking takes milliseconds where
starting Python takes seconds. The engine is the dummy one, and jobs copy what they are given; store, registry,
uploads and checker are real.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import uvicorn

from server.jobs import jobs
from store.validation import Validator
from tests.api.dummy_engine import MANIFEST
from tests.api.house import open_house


async def serve(folder: Path) -> None:
    """Until killed."""
    validator = Validator(MANIFEST)
    validator.start()
    async with open_house(folder, check=validator.check) as house:
        server = uvicorn.Server(uvicorn.Config(house.app, port=0, lifespan="off", log_config=None))
        serving = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.001)
        say(server.servers[0].sockets[0].getsockname()[1])
        await serving


def say(word: int) -> None:
    os.write(sys.stdout.fileno(), f"{word}\n".encode())


def main(folder: Path) -> None:
    jobs._MODULE = "tests.server.strange_job"
    for _ in sys.stdin:
        child = os.fork()
        if child == 0:
            try:
                asyncio.run(serve(folder))
            finally:
                os._exit(1)
        say(child)
        _, status = os.waitpid(child, 0)
        say(os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
