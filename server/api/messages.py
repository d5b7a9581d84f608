"""The turns of a conversation, as clients send them."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from server.api.conditions import GIVEN, NOT_GIVEN, NOT_SOME, SOME, Rules, has, lacks, when
from server.api.tools import ToolCall
from server.api.wire import OnlyNeutral, Text, Wire, at_most, fault
from server.engine.types import Message

MAX_NAME = 200
MAX_MESSAGES = 8192
MAX_PARTS = 8192
MAX_CALLS = 1024
_OTHER_PARTS = frozenset({"image_url", "input_audio", "audio_url", "video_url", "file", "refusal"})


class TextPart(Wire):
    """A part of a message; text is the only kind that this server knows."""

    type: Literal["text"]
    text: Text

    @model_validator(mode="before")
    @classmethod
    def _check_kind(cls, part: Any) -> Any:
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind in _OTHER_PARTS:
            what = f"parts of the kind {kind} are not supported: this base reads text"
            raise PydanticCustomError("unsupported_parameter", "not supported", {"param": ".type", "what": what})
        return part


def shape_of_text(value: object) -> str:
    """Which branch of a union of text and list a value belongs to."""
    return "parts" if isinstance(value, list) else "text"


class ChatMessage(Wire):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[
        Annotated[Text | None, Tag("text")]
        | Annotated[list[TextPart], Field(fail_fast=True), at_most(MAX_PARTS), Tag("parts")],
        Discriminator(shape_of_text),
    ] = None
    tool_calls: Annotated[list[ToolCall] | None, at_most(MAX_CALLS)] = Field(
        None, fail_fast=True, description="What the assistant has called."
    )
    tool_call_id: Text | None = Field(None, description="Which call a message of the role `tool` answers.")
    name: Text | None = Field(
        None,
        max_length=MAX_NAME,
        description="Who speaks, or the tool that answers: for chat templates that look at it.",
    )
    # Clients send an assistant's message back as they got it, with these empty.
    refusal: Annotated[None, OnlyNeutral()] = None
    annotations: Annotated[None, OnlyNeutral([])] = None
    audio: Annotated[None, OnlyNeutral()] = None
    function_call: Annotated[None, OnlyNeutral()] = None
    provider_specific_fields: Annotated[None, OnlyNeutral({}, {"refusal": None})] = None  # LiteLLM's

    between: ClassVar[Rules] = (
        when(has(role={"const": "tool"}), has(tool_call_id=GIVEN), lacks(tool_call_id=NOT_GIVEN)),
        when(
            has(role={"const": "assistant"}),
            {"anyOf": [has(content=GIVEN), has(tool_calls=SOME)]},
            has(content=GIVEN) | {"properties": {"content": GIVEN, "tool_calls": NOT_SOME}},
        ),
    )

    @model_validator(mode="after")
    def _check_role(self) -> Self:
        if self.tool_calls and self.role != "assistant":
            raise fault(".tool_calls", "belongs to the role assistant")
        if (self.role == "tool") != (self.tool_call_id is not None):
            raise fault(".tool_call_id", "belongs to the role tool, which needs it")
        if self.content is None and not self.tool_calls:
            if "content" in self.model_fields_set:
                raise fault(".content", "must be text, or a list of text parts")
            raise PydanticCustomError("missing", "missing", {"param": ".content"})
        return self

    def to_engine(self) -> Message:
        """As chat templates take it."""
        content = self.content or ""
        text = content if isinstance(content, str) else "\n".join(part.text for part in content)
        # Chat templates of open models know "system"; "developer" is OpenAI's newer word for it.
        message: Message = {"role": "system" if self.role == "developer" else self.role, "content": text}
        if self.tool_calls:
            message["tool_calls"] = [call.to_engine() for call in self.tool_calls]
        if self.role == "tool":
            message["tool_call_id"] = self.tool_call_id
        if self.name is not None:
            message["name"] = self.name
        return message


Messages = Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True), at_most(MAX_MESSAGES)]
"""A conversation."""
