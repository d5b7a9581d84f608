"""`POST /v1/completions`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Literal

from fastapi import APIRouter, Request
from starlette.responses import Response
from typing_extensions import TypedDict

from server.api.answer import Format, Json, Usage, answer_docs, respond
from server.api.logprobs import TextLogprobs, TextLogprobsWriter
from server.api.schema import CompletionBody
from server.api.services import ReadyServices
from server.choices import Choice
from server.engine.types import Likelihood, Tokenizer

router = APIRouter()


class TextChoice(TypedDict):
    """One finished continuation."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Literal["stop", "length"]


class Completion(TypedDict):
    """The continuations of one or several prompts; choice `i × n + j` is the j-th of prompt i."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[TextChoice]
    usage: Usage


class CompletionFormat(Format):
    """OpenAI's `text_completion`, whole and in pieces."""

    id_prefix = "cmpl"
    whole = "text_completion"
    chunk = "text_completion"

    def __init__(self, model: str, fingerprint: str, tokenizer: Tokenizer) -> None:
        super().__init__(model, fingerprint, tokenizer)
        self._writers: defaultdict[int, TextLogprobsWriter] = defaultdict(lambda: TextLogprobsWriter(tokenizer))

    def choice(self, index: int, choice: Choice) -> Json:
        return _text(index, choice.text, choice.finish) | {"logprobs": self._logprobs(index, choice.likelihoods)}

    def opening(self, _: int) -> None:
        return None

    def pieces(self, index: int, text: str, likelihoods: Sequence[Likelihood]) -> Iterable[Json]:
        yield _text(index, text) | {"logprobs": self._logprobs(index, likelihoods)}

    def closing(self, index: int, finish: str) -> Iterable[Json]:
        yield _text(index, "", finish)

    def _logprobs(self, index: int, likelihoods: Sequence[Likelihood]) -> TextLogprobs | None:
        return self._writers[index].write(likelihoods) if likelihoods else None


def _text(index: int, text: str, finish: str | None = None) -> Json:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": finish}


@router.post("/v1/completions", responses=answer_docs(Completion), response_class=Response)
async def create_completion(request: Request, body: CompletionBody, services: ReadyServices) -> Response:
    """Continue each prompt; with `stream`, as server-sent events."""
    style = CompletionFormat(body.model, services.fingerprint, services.engine.tokenizer)
    return await respond(request, services, body, body.to_request(), style)
