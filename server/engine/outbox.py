"""The way out of the engine's thread: results reach the event loop that waits for them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVarTuple, Unpack

from server.engine.sequence import Event

Arguments = TypeVarTuple("Arguments")


class Outbox:
    """Gathers the events of a step and hands them to the event loop in one wake-up. For the engine's thread."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._events: list[tuple[asyncio.Queue[Event], Event]] = []

    def open(self, loop: asyncio.AbstractEventLoop) -> None:
        """Deliver to this loop from now on."""
        self._loop = loop

    @property
    def empty(self) -> bool:
        return not self._events

    def put(self, events: asyncio.Queue[Event], event: Event) -> None:
        """Have `event` put into a queue of the loop at the next `flush`."""
        self._events.append((events, event))

    def flush(self) -> None:
        if self._events:
            gathered, self._events = self._events, []
            self.call(_deliver, gathered)

    def call(self, function: Callable[[Unpack[Arguments]], None], *arguments: *Arguments) -> None:
        """Call a function on the loop, soon; nothing happens once the loop is closed."""
        assert self._loop is not None, "the engine has not been started"
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *arguments)


def _deliver(gathered: list[tuple[asyncio.Queue[Event], Event]]) -> None:
    for events, event in gathered:
        events.put_nowait(event)
