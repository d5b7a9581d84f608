"""Many clients at once: each on a connection of its own, all of them open before any of them asks."""

from __future__ import annotations

import asyncio
import json
import resource
from collections import Counter
from dataclasses import dataclass, field

_ROOM = 200
"""Files that a process needs besides its connections."""


@dataclass
class Seen:
    """What came of all requests."""

    statuses: Counter[int] = field(default_factory=Counter)
    incomplete: int = 0
    """Answers that began with 200 and did not end as they should."""
    no_retry: int = 0
    """Refusals that do not say when to come again."""


def make_room(connections: int) -> None:
    """Raise the limit of open files, for this process and those it starts, as far as that is allowed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + _ROOM
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(wanted, hard), hard))


async def crowd(port: int, connections: int, tokens: int) -> Seen:
    """Let so many clients connect, then all of them ask for a stream of so many tokens."""
    seen = Seen()
    opened = [await asyncio.open_connection("127.0.0.1", port) for _ in range(connections)]
    asking = {"model": "dummy-base", "prompt": "hello", "stream": True, "max_tokens": tokens}
    body = json.dumps(asking).encode()
    head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\nconnection: close\r\n"
    request = f"{head}content-length: {len(body)}\r\n\r\n".encode() + body

    async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(request)
        answer = await reader.read()
        writer.close()
        status = int(answer.split(b" ", 2)[1])
        seen.statuses[status] += 1
        if status == 200:
            whole = b"data: [DONE]\n\n" in answer and answer.count(b'"text":"x"') == tokens
            seen.incomplete += not whole
        else:
            seen.no_retry += b"retry-after: " not in answer.lower()

    await asyncio.gather(*(ask(*one) for one in opened))
    return seen
