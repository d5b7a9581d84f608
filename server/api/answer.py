"""What clients get: an answer in one piece, or as server-sent events, in the wire format of either endpoint."""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar, NotRequired

from fastapi import Request
from fastapi.responses import JSONResponse
from starlette.responses import Response
from typing_extensions import TypedDict

from server.api.schema import GenerateBody
from server.api.services import Services
from server.api.streaming import Events, EventStream, until_disconnect
from server.choices import Answer, Choice, Delta, Route
from server.engine.types import Likelihood, Tokenizer
from server.generation import GenerationRequest

MIX_HEADER = "x-switchyard-mix"
EXACT_HEADER = "x-switchyard-exact"
_HEADER_MIXES = 8
"""Proxies drop headers beyond a few kilobytes; the body tells the rest."""

Json = dict[str, Any]


class MixPart(TypedDict):
    """One expert of a mix."""

    id: str
    digest: str
    weight: float
    stands_on: NotRequired[list[str]]
    """Digests of the experts that answered with it, at its weight, nearest first."""


class Origin(TypedDict):
    """Who answered a prompt, and why: the empty mix is the base."""

    mix: list[MixPart]
    reason: str
    distance: float | None
    exact: NotRequired[bool]
    """Whether this is the answer of a fine-tune bit by bit; only where an expert of the mix overwrites weights."""


class PromptDetails(TypedDict):
    """Of the tokens of prompts, those that were in the cache."""

    cached_tokens: int


class Usage(TypedDict):
    """Tokens spent. `switchyard` has an entry `prompts`, one origin each, if there were several prompts."""

    prompt_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens: int
    total_tokens: int
    switchyard: Json


class Format(ABC):
    """How one endpoint writes answers; one object per answer."""

    id_prefix: ClassVar[str]
    whole: ClassVar[str]
    """The `object` of an answer in one piece."""
    chunk: ClassVar[str]
    """The `object` of a piece."""

    def __init__(self, model: str, fingerprint: str, tokenizer: Tokenizer) -> None:
        self._id = f"{self.id_prefix}-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._model = model
        self._fingerprint = fingerprint
        self._tokenizer = tokenizer

    def envelope(self, kind: str, choices: Sequence[Json]) -> Json:
        """What surrounds the choices; all pieces of one answer share the id."""
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._model,
            "system_fingerprint": self._fingerprint,
            "choices": list(choices),
        }

    @abstractmethod
    def choice(self, index: int, choice: Choice) -> Json:
        """A finished choice."""

    @abstractmethod
    def opening(self, index: int) -> Json | None:
        """What a choice begins with when streamed, if anything."""

    @abstractmethod
    def pieces(self, index: int, text: str, likelihoods: Sequence[Likelihood]) -> Iterable[Json]:
        """What more of a choice's text makes certain."""

    @abstractmethod
    def closing(self, index: int, finish: str) -> Iterable[Json]:
        """What a choice ends with when streamed."""


class Chunks:
    """The chunks of a streamed answer."""

    def __init__(self, answer: Answer, style: Format, *, include_usage: bool) -> None:
        self._answer = answer
        self._style = style
        self._include_usage = include_usage
        self._opened: set[int] = set()

    async def after(self, first: Delta) -> Events:
        """All of them; the first delta is there already."""
        for chunk in self._of(first):
            yield chunk
        async for delta in self._answer:
            for chunk in self._of(delta):
                yield chunk
        if self._include_usage:
            yield self._style.envelope(self._style.chunk, ()) | {"usage": usage(self._answer)}

    def _of(self, delta: Delta) -> Iterator[Json]:
        if delta.choice not in self._opened:
            self._opened.add(delta.choice)
            if opening := self._style.opening(delta.choice):
                yield self._chunk(opening)
        if delta.text or delta.likelihoods:
            yield from map(self._chunk, self._style.pieces(delta.choice, delta.text, delta.likelihoods))
        if delta.finish is not None:
            yield from map(self._chunk, self._style.closing(delta.choice, delta.finish))

    def _chunk(self, choice: Json) -> Json:
        envelope = self._style.envelope(self._style.chunk, (choice,))
        return envelope | {"usage": None} if self._include_usage else envelope


async def respond(
    request: Request, services: Services, body: GenerateBody, wanted: GenerationRequest, style: Format
) -> Response:
    """Generate what is wanted and write it in a form; a client that goes away stops it."""
    answer = await services.generation.start(wanted, request.state.caller)
    headers = {MIX_HEADER: mix_header(answer.routes)} | exact_header(answer.routes)
    try:
        if body.stream:
            # What fails before the first token still gets a status of its own.
            first = await until_disconnect(request.receive, answer.__anext__())
            chunks = Chunks(answer, style, include_usage=body.include_usage)
            return EventStream(chunks.after(first), services.closing, headers, answer.aclose)
        choices = await until_disconnect(request.receive, answer.collect())
    except BaseException:
        await answer.aclose()
        raise
    await answer.aclose()
    whole = style.envelope(style.whole, [style.choice(i, choice) for i, choice in enumerate(choices)])
    return JSONResponse(whole | {"usage": usage(answer)}, headers=headers)


def answer_docs(whole: Any) -> dict[int | str, dict[str, Any]]:
    """What the API's description says of a successful answer."""
    return {200: {"model": whole, "content": {"text/event-stream": {}}, "description": "In one piece, or streamed."}}


def mix_header(routes: Sequence[Route]) -> str:
    """`name=weight,name2=weight2`, or `base`; the mixes of several prompts that differ are set apart by `; `."""
    texts = (",".join(f"{part.name}={part.weight:g}" for part in route.parts) or "base" for route in routes)
    mixes = list(dict.fromkeys(texts))
    return "; ".join(mixes if len(mixes) <= _HEADER_MIXES else [*mixes[:_HEADER_MIXES], "..."])


def exact_header(routes: Sequence[Route]) -> dict[str, str]:
    """`true` if every answer is that of a fine-tune bit by bit, `false` if one that could be is not, else nothing."""
    said = [route.exact for route in routes if route.exact is not None]
    return {EXACT_HEADER: "true" if all(said) and len(said) == len(routes) else "false"} if said else {}


def usage(answer: Answer) -> Usage:
    """What the answer has cost, and where it came from."""
    origins = [origin(route) for route in answer.routes]
    switchyard: Json = {**origins[0]}
    if len(origins) > 1:
        if any(route.mix != answer.routes[0].mix for route in answer.routes):
            switchyard = {"mix": None, "reason": "per_prompt", "distance": None}
        switchyard["prompts"] = origins
    return {
        "prompt_tokens": answer.prompt_tokens,
        "prompt_tokens_details": {"cached_tokens": answer.cached_tokens},
        "completion_tokens": answer.completion_tokens,
        "total_tokens": answer.prompt_tokens + answer.completion_tokens,
        "switchyard": switchyard,
    }


def origin(route: Route) -> Origin:
    """The route as clients see it."""
    parts: list[MixPart] = []
    for part in route.parts:
        told: MixPart = {"id": part.name, "digest": part.digest, "weight": part.weight}
        parts.append({**told, "stands_on": list(part.below)} if part.below else told)
    said: Origin = {"mix": parts, "reason": route.reason, "distance": route.distance}
    return said if route.exact is None else {**said, "exact": route.exact}
