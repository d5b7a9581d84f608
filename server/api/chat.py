"""`POST /v1/chat/completions`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from fastapi import APIRouter, Request
from starlette.responses import Response
from typing_extensions import TypedDict

from server.api.answer import Format, Json, Usage, answer_docs, respond
from server.api.logprobs import ChatLogprobs, chat_logprobs
from server.api.schema import ChatBody
from server.api.services import ReadyServices
from server.choices import Choice
from server.engine.types import Likelihood

router = APIRouter()


class AssistantMessage(TypedDict):
    """The model's turn."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(TypedDict):
    """One finished answer."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(TypedDict):
    """The answer to a conversation."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class ChatFormat(Format):
    """OpenAI's `chat.completion` and `chat.completion.chunk`."""

    id_prefix = "chatcmpl"
    whole = "chat.completion"
    chunk = "chat.completion.chunk"

    def choice(self, index: int, choice: Choice) -> Json:
        message = {"role": "assistant", "content": choice.text, "refusal": None}
        told = self._logprobs(choice.likelihoods)
        return {"index": index, "message": message, "logprobs": told, "finish_reason": choice.finish}

    def opening(self, index: int) -> Json:
        return _delta(index, {"role": "assistant", "content": ""})

    def piece(self, index: int, text: str, likelihoods: Sequence[Likelihood]) -> Json:
        return _delta(index, {"content": text}) | {"logprobs": self._logprobs(likelihoods)}

    def closing(self, index: int, finish: str) -> Json:
        return _delta(index, {}, finish)

    def _logprobs(self, likelihoods: Sequence[Likelihood]) -> ChatLogprobs | None:
        return chat_logprobs(likelihoods, self._tokenizer) if likelihoods else None


def _delta(index: int, delta: Json, finish: str | None = None) -> Json:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}


@router.post("/v1/chat/completions", responses=answer_docs(ChatCompletion), response_class=Response)
async def create_chat_completion(request: Request, body: ChatBody, services: ReadyServices) -> Response:
    """Answer a conversation; with `stream`, as server-sent events."""
    return await respond(request, services, body, ChatFormat)
