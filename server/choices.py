"""An answer at work: the engine's tokens become text, piece by piece."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from server.engine.timing import Timing
from server.engine.types import FinishReason, Likelihood, TokenEvent, TokenStream
from server.metrics import Metrics
from server.text import IncrementalDecoder, StopMatcher
from server.tracing import Tracing, record_answer
from store.mix import Mix


@dataclass(frozen=True)
class Part:
    """One expert of a mix, as it is told to the client.

    Attributes:
        below: digests of the experts that it stands on and that answer with it at its weight, nearest first.
    """

    name: str
    digest: str
    weight: float
    below: tuple[str, ...] = ()


@dataclass(frozen=True)
class Route:
    """Which mix answers one prompt, and why.

    Attributes:
        exact: whether the answer is that of a fine-tune bit by bit; None where no expert of the mix can give that.
    """

    mix: Mix
    parts: tuple[Part, ...]
    reason: str
    distance: float | None = None
    exact: bool | None = None


@dataclass(frozen=True)
class Delta:
    """A piece of one choice: the text that has become certain, and how many tokens were spent on it. Likelihoods come
    with the token, which may be before its text; a prompt's come with the first piece, before the answer's own."""

    choice: int
    text: str
    tokens: int
    finish: FinishReason | None
    likelihoods: tuple[Likelihood, ...] = ()


@dataclass(frozen=True)
class Choice:
    """One finished answer."""

    text: str
    finish: FinishReason
    likelihoods: tuple[Likelihood, ...] = ()


class Answer:
    """A request at work: an async iterator of the pieces of all its choices, in the order in which they come.

    Close it, whatever happens: that is what frees the engine.

    Args:
        on_close: told how many tokens were spent, once.
    """

    def __init__(
        self,
        routes: tuple[Route, ...],
        prompt_tokens: int,
        choices: Sequence[tuple[TokenStream, ChoiceText]],
        metrics: Metrics,
        began: float,
        on_close: Callable[[int], None],
        tracing: Tracing,
    ) -> None:
        self.routes = routes
        """The route of each prompt."""
        self.prompt_tokens = prompt_tokens
        self.completion_tokens = 0
        """Tokens spent so far on all choices."""
        self.choices = len(choices)
        self._cached: dict[int, int] = {}
        """Choice → tokens of its prompt that were not computed."""
        self._metrics = metrics
        self._began = began
        self._tracing = tracing
        self._on_close: Callable[[int], None] | None = on_close
        self._unfinished = len(choices)
        self._pieces: asyncio.Queue[Delta | Exception] = asyncio.Queue()
        self._streams = [stream for stream, _ in choices]
        self._pumps = [asyncio.create_task(self._pump(i, *choice)) for i, choice in enumerate(choices)]

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompts that no choice had to compute, as far as it is known."""
        per_prompt = max(1, self.choices // len(self.routes))
        least: dict[int, int] = {}
        for choice, cached in self._cached.items():
            least[choice // per_prompt] = min(cached, least.get(choice // per_prompt, cached))
        return sum(least.values())

    def __aiter__(self) -> Answer:
        return self

    async def __anext__(self) -> Delta:
        if not self._unfinished:
            raise StopAsyncIteration
        piece = await self._pieces.get()
        if isinstance(piece, Exception):
            raise piece
        self.completion_tokens += piece.tokens
        if piece.finish is not None:
            self._unfinished -= 1
        return piece

    async def collect(self) -> list[Choice]:
        """All choices, finished."""
        texts = [""] * self.choices
        ends = [FinishReason.STOP] * self.choices
        likelihoods: list[list[Likelihood]] = [[] for _ in texts]
        async for piece in self:
            texts[piece.choice] += piece.text
            likelihoods[piece.choice] += piece.likelihoods
            ends[piece.choice] = piece.finish or ends[piece.choice]
        return [Choice(text, end, tuple(told)) for text, end, told in zip(texts, ends, likelihoods, strict=True)]

    async def aclose(self) -> None:
        """Cancel what still runs."""
        for pump in self._pumps:
            pump.cancel()
        await asyncio.gather(*self._pumps, return_exceptions=True)
        for stream in self._streams:  # a pump that was cancelled before it began has closed nothing
            await stream.aclose()
        on_close, self._on_close = self._on_close, None
        if on_close is not None:  # once, with all that was spent, also on an answer that nobody waited for
            on_close(self.completion_tokens)

    async def _pump(self, choice: int, stream: TokenStream, text: ChoiceText) -> None:
        previous: float | None = None
        timing: Timing | None = None
        tokens = 0
        try:
            async for event in stream:
                now = time.monotonic()
                timing = timing or event.timing
                self._cached.setdefault(choice, event.cached_tokens)
                tokens += event.token is not None
                if previous is None:
                    self._metrics.time_to_first_token.observe(now - self._began)
                else:
                    self._metrics.inter_token.observe(now - previous)
                previous = now
                piece, finish = text.push(event)
                told = event.prompt + (() if event.likelihood is None else (event.likelihood,))
                self._pieces.put_nowait(Delta(choice, piece, int(event.token is not None), finish, told))
                if finish is not None:
                    self._metrics.end_to_end.observe(now - self._began)
                    return
            raise RuntimeError("the engine ended an answer without a reason")
        except Exception as error:
            self._pieces.put_nowait(error)
        finally:
            await stream.aclose()
            if timing is not None:
                self._metrics.time_inside(timing)
                record_answer(self._tracing, timing, time.monotonic(), choice=choice, tokens=tokens)


class ChoiceText:
    """The text of one choice: the prompt if it is echoed; decoding, then stop strings."""

    def __init__(self, decoder: IncrementalDecoder, stops: StopMatcher, echo: str) -> None:
        self._decoder = decoder
        self._stops = stops
        self._echo = echo

    def push(self, event: TokenEvent) -> tuple[str, FinishReason | None]:
        """The text that this event makes certain, and why the choice ends here, if it does."""
        text = "" if event.token is None else self._decoder.push(event.token)
        if event.finish is not None:
            text += self._decoder.flush()
        echo, self._echo = self._echo, ""
        text = echo + self._stops.push(text)  # a stop string in the prompt ends nothing
        if self._stops.matched:
            return text, FinishReason.STOP
        if event.finish is not None:
            text += self._stops.flush()
        return text, event.finish
