"""`POST /v1/chat/completions`."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Sequence
from typing import Literal, NotRequired

from fastapi import APIRouter, Request
from starlette.responses import Response
from typing_extensions import TypedDict

from server.api.answer import Format, Json, Usage, answer_docs, respond
from server.api.logprobs import ChatLogprobs, chat_logprobs
from server.api.schema import ChatBody
from server.api.services import ReadyServices
from server.choices import Choice
from server.engine.types import Likelihood, Tokenizer
from server.tools.parsers import ToolParser
from server.tools.pieces import Piece
from server.tools.use import ToolUse

router = APIRouter()


class FunctionCall(TypedDict):
    """What is to be called; `arguments` is JSON as the model wrote it."""

    name: str
    arguments: str


class ToolCallAnswer(TypedDict):
    """A call of a tool."""

    id: str
    type: Literal["function"]
    function: FunctionCall


class AssistantMessage(TypedDict):
    """The model's turn; `content` is null where there are only calls."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: NotRequired[list[ToolCallAnswer]]


class ChatChoice(TypedDict):
    """One finished answer."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]


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

    def __init__(self, model: str, fingerprint: str, tokenizer: Tokenizer, tools: ToolUse | None) -> None:
        super().__init__(model, fingerprint, tokenizer)
        self._tools = tools
        self._parsers: dict[int, ToolParser] = {}

    def choice(self, index: int, choice: Choice) -> Json:
        message: Json = {"role": "assistant", "content": choice.text, "refusal": None}
        finish: str = choice.finish
        if self._tools is not None:
            text, calls = self._read(choice.text, self._tools)
            message["content"] = text or (None if calls else "")
            if calls:
                message["tool_calls"] = calls
                finish = _finish(finish)
        told = self._logprobs(choice.likelihoods)
        return {"index": index, "message": message, "logprobs": told, "finish_reason": finish}

    def opening(self, index: int) -> Json:
        return _delta(index, {"role": "assistant", "content": ""})

    def pieces(self, index: int, text: str, likelihoods: Sequence[Likelihood]) -> Iterable[Json]:
        if self._tools is None:
            yield _delta(index, {"content": text}) | {"logprobs": self._logprobs(likelihoods)}
            return
        parser = self._parsers.setdefault(index, self._tools.parser())
        told = self._logprobs(likelihoods)
        for piece in parser.push(text):
            # With the first of the pieces that the tokens led to.
            yield self._piece(index, piece) | {"logprobs": told}
            told = None
        if told is not None:
            yield _delta(index, {}) | {"logprobs": told}

    def closing(self, index: int, finish: str) -> Iterable[Json]:
        parser = self._parsers.get(index)
        if parser is not None:
            for piece in parser.flush():
                yield self._piece(index, piece)
            finish = _finish(finish) if parser.calls else finish
        yield _delta(index, {}, finish)

    def _piece(self, index: int, piece: Piece) -> Json:
        if piece.call is None:
            return _delta(index, {"content": piece.text})
        call: Json = {"index": piece.call, "function": {"arguments": piece.arguments}}
        if piece.name is not None:
            call |= {"id": self._call_id(), "type": "function"}
            call["function"] = {"name": piece.name, "arguments": piece.arguments}
        return _delta(index, {"tool_calls": [call]})

    def _read(self, whole: str, tools: ToolUse) -> tuple[str, list[ToolCallAnswer]]:
        parser, text, calls = tools.parser(), "", list[ToolCallAnswer]()
        for piece in (*parser.push(whole), *parser.flush()):
            if piece.call is None:
                text += piece.text
            elif piece.name is not None:
                function: FunctionCall = {"name": piece.name, "arguments": piece.arguments}
                calls.append({"id": self._call_id(), "type": "function", "function": function})
            else:
                calls[piece.call]["function"]["arguments"] += piece.arguments
        return text, calls

    def _call_id(self) -> str:
        assert self._tools is not None
        return self._tools.call_id(uuid.uuid4().hex)

    def _logprobs(self, likelihoods: Sequence[Likelihood]) -> ChatLogprobs | None:
        return chat_logprobs(likelihoods, self._tokenizer) if likelihoods else None


def _finish(finish: str) -> str:
    """Why an answer with calls ended: one that ran out of tokens says so."""
    return "tool_calls" if finish == "stop" else finish


def _delta(index: int, delta: Json, finish: str | None = None) -> Json:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}


@router.post("/v1/chat/completions", responses=answer_docs(ChatCompletion), response_class=Response)
async def create_chat_completion(request: Request, body: ChatBody, services: ReadyServices) -> Response:
    """Answer a conversation; with `stream`, as server-sent events."""
    tools = body.tool_use(services.tool_format)
    style = ChatFormat(body.model, services.fingerprint, services.engine.tokenizer, tools)
    return await respond(request, services, body, body.to_request(tools), style)
