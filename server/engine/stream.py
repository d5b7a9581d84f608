"""One request's tokens, on the event loop's side."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING

from server.engine.outbox import Outbox
from server.engine.sequence import Event, Sequence
from server.engine.types import EngineRequest, TokenEvent

if TYPE_CHECKING:
    from llguidance import LLMatcher


class EngineStream:
    """A `TokenStream` fed by the engine's thread.

    Args:
        eos: tokens with which the model ends its turn.
        grammar: what the answer must follow, if anything.
        outbox: what carries the events here.
        closed: called once, when the stream has ended in whatever way.
        cancel: called if it is closed before its end.
    """

    def __init__(
        self,
        request: EngineRequest,
        max_tokens: int,
        outbox: Outbox,
        *,
        eos: frozenset[int],
        grammar: LLMatcher | None,
        closed: Callable[[], None],
        cancel: Callable[[Sequence], None],
    ) -> None:
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._closed = closed
        self._cancel = cancel
        self._done = False
        self.sequence = Sequence(
            request, max_tokens, emit=lambda event: outbox.put(self._events, event), eos=eos, grammar=grammar
        )

    def __aiter__(self) -> AsyncIterator[TokenEvent]:
        return self

    async def __anext__(self) -> TokenEvent:
        if self._done:
            raise StopAsyncIteration
        event = await self._events.get()
        if isinstance(event, Exception):
            self._finish()
            raise event
        if event.finish is not None:
            self._finish()
        return event

    async def aclose(self) -> None:
        if not self._done:
            self._finish()
            self._cancel(self.sequence)

    def _finish(self) -> None:
        self._done = True
        self._closed()
