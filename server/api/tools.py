"""Tools as clients define and use them: `tools`, `tool_choice`, and the calls in a conversation."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from server.api.conditions import SOME, Rules, has, when
from server.api.wire import FreeForm, OnlyNeutral, Text, Wire, check_json, fault
from server.api.words import schema_of
from server.tools.use import DEFINITIONS, ToolFormat, ToolUse
from store.errors import InvalidRequestError

MAX_TOOLS = 128
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


def _check_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise PydanticCustomError("invalid_value", "a tool's name has 1 to 64 letters, digits, '_', '-' and '.'")
    return name


def _check_parameters(parameters: dict[str, Any]) -> dict[str, Any]:
    for keyword in DEFINITIONS:
        if not isinstance(parameters.get(keyword, {}), dict):
            raise PydanticCustomError("invalid_value", f"{keyword} must be an object")
    return parameters


def _check_arguments(text: str) -> str:
    try:
        arguments = json.loads(text or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise PydanticCustomError("invalid_value", "must be a JSON object, as text")
    check_json(arguments)
    return text


ToolName = Annotated[str, AfterValidator(_check_name), Field(json_schema_extra=schema_of(_NAME))]


class Function(Wire):
    """What a model may call."""

    name: ToolName
    description: Text | None = None
    parameters: Annotated[FreeForm, AfterValidator(_check_parameters)] | None = Field(
        None, description="A JSON Schema of the arguments."
    )
    strict: bool | None = Field(
        None, description="Accepted; arguments are held to the schema where a call is required."
    )


class Tool(Wire):
    """A tool; functions are the only kind."""

    type: Literal["function"]
    function: Function


class ChosenFunction(Wire):
    """The name of a tool."""

    name: ToolName


class ToolChoice(Wire):
    """The one tool that must be called."""

    type: Literal["function"]
    function: ChosenFunction


def _shape_of_choice(value: object) -> str:
    return "named" if isinstance(value, dict | ToolChoice) else "word"


class CalledFunction(Wire):
    """What was called, and with what."""

    name: ToolName
    arguments: Annotated[Text, AfterValidator(_check_arguments)] = Field(description="JSON.")


class ToolCall(Wire):
    """A call in an assistant's message, as it was answered."""

    id: Text = Field(min_length=1, max_length=200)
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None

    def to_engine(self) -> dict[str, Any]:
        """As chat templates take it: arguments are an object."""
        function = {"name": self.function.name, "arguments": json.loads(self.function.arguments or "{}")}
        return {"id": self.id, "type": "function", "function": function}


_MUST_CALL = {"anyOf": [{"const": "required"}, {"type": "object"}]}


class ToolFields(Wire):
    """What a request says about tools."""

    tools: list[Tool] | None = Field(None, max_length=MAX_TOOLS, fail_fast=True)
    tool_choice: Annotated[
        Annotated[Literal["none", "auto", "required"] | None, Tag("word")] | Annotated[ToolChoice, Tag("named")],
        Discriminator(_shape_of_choice),
    ] = Field(None, description="none, auto (default), required, or one tool by name.")
    parallel_tool_calls: bool | None = Field(True, description="Whether an answer may hold several calls.")
    functions: Annotated[None, OnlyNeutral([])] = None
    function_call: Annotated[None, OnlyNeutral("none")] = None

    between: ClassVar[Rules] = (when(has(tool_choice=_MUST_CALL), has(tools=SOME)),)

    @model_validator(mode="after")
    def _check_tools(self) -> Self:
        names = [tool.function.name for tool in self.tools or ()]
        for i, name in enumerate(names):
            if name in names[:i]:
                raise fault(f"tools[{i}].function.name", f"{name!r} is there twice")
        if isinstance(self.tool_choice, ToolChoice) and self.tool_choice.function.name not in names:
            raise fault("tool_choice.function.name", f"there is no tool {self.tool_choice.function.name!r}")
        if self.tool_choice == "required" and not names:
            raise fault("tool_choice", "required needs tools")
        return self

    def tool_use(self, known: ToolFormat | None) -> ToolUse | None:
        """The tools of this request, if the model may call any.

        Args:
            known: how the base writes calls; None if it cannot.

        Raises:
            InvalidRequestError: it cannot, and is asked to.
        """
        if not self.tools or self.tool_choice == "none":
            return None
        if known is None:
            raise InvalidRequestError(
                "this base cannot call tools: its chat template knows none, or writes calls in no known form (then the "
                "server's setting tool_parser may name one)",
                param="tools",
                code="unsupported_parameter",
            )
        named = self.tool_choice if isinstance(self.tool_choice, ToolChoice) else None
        return ToolUse(
            tuple(tool.model_dump(exclude_none=True) for tool in self.tools),
            known,
            must_call=named is not None or self.tool_choice == "required",
            only=None if named is None else named.function.name,
            parallel=self.parallel_tool_calls is not False,
        )
