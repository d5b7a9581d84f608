"""Asking a server for a trace over HTTP, a fixed number of requests at a time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import httpx

from bench.peers.trace import Asked

Body = Callable[[Asked], dict[str, Any]]
TIMEOUT = 600.0
SHORT = 4
"""Tokens of a short answer."""


class WrongAnswerError(RuntimeError):
    """A server gave less than it was asked for."""


@dataclass(frozen=True)
class Peer:
    """A server that runs: what tables call it, where it is, and how it wants to be asked."""

    name: str
    url: str
    pid: int
    body: Body


@dataclass(frozen=True)
class Answer:
    """Text, counts as the server tells them, and seconds from the request to the whole answer."""

    text: str
    prompt_tokens: int
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Replay:
    """A whole trace: seconds from the first request to the last answer, and the answers in the trace's order."""

    seconds: float
    answers: tuple[Answer, ...]

    @property
    def tokens_per_second(self) -> float:
        """Tokens of completed answers per second."""
        return sum(answer.tokens for answer in self.answers) / self.seconds


async def replay(peer: Peer, trace: Sequence[Asked], concurrent: int) -> Replay:
    """Ask for everything, `concurrent` requests at a time, in the trace's order.

    Raises:
        WrongAnswerError: an answer is empty, or not as long as was asked for.
        httpx.HTTPError: the server refused, broke off, or did not answer in ten minutes.
    """
    answers: dict[int, Answer] = {}
    waiting = iter(enumerate(trace))

    async def client(http: httpx.AsyncClient) -> None:
        for place, asked in waiting:
            answers[place] = await _ask(http, peer, asked)

    limits = httpx.Limits(max_connections=concurrent)
    async with httpx.AsyncClient(base_url=peer.url, timeout=TIMEOUT, limits=limits, trust_env=False) as http:
        began = time.perf_counter()
        await asyncio.gather(*(client(http) for _ in range(concurrent)))
        seconds = time.perf_counter() - began
    return Replay(seconds, tuple(answers[place] for place in range(len(trace))))


async def _ask(http: httpx.AsyncClient, peer: Peer, asked: Asked) -> Answer:
    began = time.perf_counter()
    response = await http.post("/v1/chat/completions", json=peer.body(asked))
    if response.is_error:
        raise WrongAnswerError(f"{peer.name}: {response.status_code} {response.text[:500]}")
    said = response.json()
    text, usage = str(said["choices"][0]["message"]["content"] or ""), said["usage"]
    tokens = int(usage["completion_tokens"])
    if not asked.natural and (tokens != asked.max_tokens or not text):
        raise WrongAnswerError(f"{peer.name}: {tokens} tokens for {asked.max_tokens}, {text!r} for {asked.prompt!r}")
    return Answer(text, int(usage["prompt_tokens"]), tokens, time.perf_counter() - began)


async def decode_speed(peer: Peer, asked: Asked) -> float:
    """Tokens per second of one stream, decoding alone: how much longer a long answer takes than a short one. Pieces of
    a stream tell less, as tokens without text come in none.

    Raises:
        WrongAnswerError: as `replay`; or a long answer took no longer than a short one.
    """
    short = await replay(peer, [replace(asked, max_tokens=SHORT)], 1)
    long = await replay(peer, [asked], 1)
    if long.seconds <= short.seconds:
        raise WrongAnswerError(f"{peer.name}: {asked.max_tokens} tokens came no later than {SHORT}")
    return (asked.max_tokens - SHORT) / (long.seconds - short.seconds)
