"""What clients send. Strict: a field that is unknown, or known but without effect here, is refused by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Self

from pydantic import AfterValidator, Discriminator, Field, Tag, field_validator, model_validator

from router.options import ANY, RouteOptions
from server.api.conditions import GIVEN, NOT_GIVEN, SOME, TRUE, Rules, all_of, exactly_one, has, lacks, when
from server.api.messages import Messages, shape_of_text
from server.api.routing import Routing
from server.api.sampling import MAX_BIASES, SamplingFields
from server.api.structured import UNSTRUCTURED
from server.api.tools import ToolFields
from server.api.wire import MAX_TOKEN, OnlyNeutral, Text, Token, Wire, check_unicode, fault
from server.engine.types import SamplingParams
from server.generation import AUTO, GenerationRequest
from server.prompts import ChatPrompt, Prompt, TextPrompt, TokenPrompt
from server.tools.use import ToolUse

MAX_EXPERTS = 16
MAX_WEIGHT = 10.0
MAX_STOPS = 4
MAX_STOP = 1024
MAX_LOGPROBS = 20


class StreamOptions(Wire):
    """Options that make sense with `stream` only."""

    include_usage: bool = Field(False, description="Send one more chunk, with the usage, before the end.")
    include_obfuscation: Annotated[None, OnlyNeutral(False)] = None


class ExpertWeight(Wire):
    """One expert of an explicit mix."""

    id: Text = Field(description="The expert's name.")
    weight: float = Field(1.0, ge=-MAX_WEIGHT, le=MAX_WEIGHT, description="Multiplier of its task vector.")


Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP), AfterValidator(check_unicode)]


ROUTED = all_of(has(model={"const": AUTO}), lacks(experts=NOT_GIVEN))
"""What leaves it open who answers."""
ASKING = {"contains": has(role={"const": "user"})}
"""A conversation that can be routed."""


class GenerateBody(SamplingFields, ABC):
    """What chat and completions have in common."""

    model: Text = Field(description="The base's name, an expert's name, or `auto`: routed by the prompt.")
    experts: list[ExpertWeight] | None = Field(
        None, min_length=1, max_length=MAX_EXPERTS, description="An explicit mix; `model` is then `auto` or the base."
    )
    routing: Routing | None = Field(None, description="Constraints on the route; only with `model` auto.")
    max_tokens: int | None = Field(None, ge=1, le=MAX_TOKEN)
    n: int | None = Field(1, ge=1)
    stop: Annotated[
        Annotated[Stop | None, Tag("text")] | Annotated[list[Stop], Field(max_length=MAX_STOPS), Tag("parts")],
        Discriminator(shape_of_text),
    ] = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, description="Accepted and not used.")

    between: ClassVar[Rules] = (
        when(has(stream_options=GIVEN), has(stream=TRUE)),
        when(has(routing=GIVEN), ROUTED),
    )

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _check_biases(cls, bias: Any) -> Any:
        if isinstance(bias, dict) and len(bias) > MAX_BIASES:  # pydantic would look at all of them first
            raise fault("logit_bias", f"has more than {MAX_BIASES} entries")
        return bias

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise fault("stream_options", "only allowed with stream")
        if self.routing is not None and (self.model != AUTO or self.experts):
            raise fault("routing", "only allowed with model auto and without experts: nothing else is routed")
        seen: set[str] = set()
        for i, expert in enumerate(self.experts or ()):
            if expert.id in seen:
                raise fault(f"experts[{i}].id", f"{expert.id!r} is there twice")
            seen.add(expert.id)
        return self

    @model_validator(mode="after")
    def _check_lengths(self) -> Self:
        most = self.usual_tokens if self.most_tokens is None else self.most_tokens
        if most is not None and (self.min_tokens or 0) > most:
            raise fault("min_tokens", f"{self.min_tokens} is more than the {most} tokens that the answer may have")
        return self

    @property
    def most_tokens(self) -> int | None:
        return self.max_tokens

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    usual_tokens: ClassVar[int | None] = None
    """Most tokens of an answer if the client did not say."""

    @abstractmethod
    def to_request(self) -> GenerationRequest:
        """What `server.generation` is to do."""

    def _request(self, *prompts: Prompt) -> GenerationRequest:
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return GenerationRequest(
            self.model,
            prompts,
            experts=tuple((expert.id, expert.weight) for expert in self.experts or ()),
            sampling=self.to_sampling(),
            usual_tokens=self.usual_tokens,
            stop=tuple(stops),
            n=self.n or 1,
            routing=_options(self.routing),
        )


class ChatBody(GenerateBody, ToolFields):
    """The body of `POST /v1/chat/completions`."""

    messages: Messages
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_TOKEN)
    logprobs: bool | None = Field(False, description="Tell how likely each token of the answer was.")
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS, description="And the likeliest in its place.")

    audio: Annotated[None, OnlyNeutral()] = None
    metadata: Annotated[None, OnlyNeutral({})] = None
    modalities: Annotated[None, OnlyNeutral(["text"])] = None
    prediction: Annotated[None, OnlyNeutral()] = None
    prompt_cache_key: Annotated[None, OnlyNeutral()] = None
    reasoning_effort: Annotated[None, OnlyNeutral()] = None
    safety_identifier: Annotated[None, OnlyNeutral()] = None
    service_tier: Annotated[None, OnlyNeutral("auto", "default")] = None
    store: Annotated[None, OnlyNeutral(False)] = None
    verbosity: Annotated[None, OnlyNeutral("medium")] = None
    web_search_options: Annotated[None, OnlyNeutral()] = None

    between: ClassVar[Rules] = (
        when(
            ROUTED,
            has(messages=ASKING),
        ),
        when(has(top_logprobs={"type": "integer", "minimum": 1}), has(logprobs=TRUE)),
        when(
            has(tools=SOME),
            {
                "anyOf": [
                    has(tool_choice={"const": "none"}),
                    lacks(response_format=UNSTRUCTURED, structured_outputs=NOT_GIVEN),
                ]
            },
        ),
    )

    @model_validator(mode="after")
    def _check_max_tokens(self) -> Self:
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise fault("max_tokens", "not the same as max_completion_tokens: give one of them")
        return self

    @model_validator(mode="after")
    def _check_one_form(self) -> Self:
        if self.tools and self.tool_choice != "none" and self.to_grammar() is not None:
            raise fault("response_format", "not together with tools that may be called: give one of them")
        return self

    @model_validator(mode="after")
    def _check_logprobs(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise fault("top_logprobs", "only allowed with logprobs")
        return self

    @property
    def most_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def told_logprobs(self) -> int | None:
        return self.top_logprobs or 0 if self.logprobs else None

    def to_request(self, tools: ToolUse | None = None) -> GenerationRequest:
        messages = tuple(message.to_engine() for message in self.messages)
        if tools is None:
            return self._request(ChatPrompt(messages))
        request = self._request(ChatPrompt(messages, tuple(tools.template_tools)))
        if (grammar := tools.grammar()) is not None:
            request = replace(request, sampling=replace(request.sampling, grammar=grammar))
        return replace(request, show_special=True)


def shape_of_prompt(value: object) -> str:
    """Which branch of a union of prompts a value belongs to."""
    if not isinstance(value, list):
        return "text"
    first = value[0] if value else None
    return "token_lists" if isinstance(first, list) else "tokens" if isinstance(first, int) else "texts"


_Tokens = Annotated[list[Token], Field(min_length=1, fail_fast=True)]
Prompts = Annotated[
    Annotated[Text, Tag("text")]
    | Annotated[list[Text], Field(min_length=1, fail_fast=True), Tag("texts")]
    | Annotated[_Tokens, Tag("tokens")]
    | Annotated[list[_Tokens], Field(min_length=1, fail_fast=True), Tag("token_lists")],
    Discriminator(shape_of_prompt),
]
"""One or several, as text or as token ids."""


def prompts_of(given: str | list[str] | list[int] | list[list[int]], param: str) -> list[Prompt]:
    """What stands in a field of type `Prompts`."""
    several = given if isinstance(given, list) and not isinstance(given[0], int) else [given]
    return [TextPrompt(item, param) if isinstance(item, str) else TokenPrompt(tuple(item), param) for item in several]


class CompletionBody(GenerateBody):
    """The body of `POST /v1/completions`."""

    usual_tokens = 16  # OpenAI's default; chat has none

    prompt: Prompts

    max_tokens: int | None = Field(None, ge=0, le=MAX_TOKEN, description="0 with `echo` computes the prompt only.")
    echo: bool | None = Field(False, description="Begin the text with the prompt.")
    logprobs: int | None = Field(
        None, ge=0, le=MAX_LOGPROBS, description="Tell how likely each token was, and so many likeliest in its place."
    )

    best_of: Annotated[None, OnlyNeutral(1)] = None
    suffix: Annotated[None, OnlyNeutral("")] = None

    between: ClassVar[Rules] = (when(has(max_tokens={"const": 0}), has(echo=TRUE)),)

    def to_request(self) -> GenerationRequest:
        return replace(self._request(*prompts_of(self.prompt, "prompt")), echo=bool(self.echo))

    @model_validator(mode="after")
    def _check_echo(self) -> Self:
        if self.max_tokens == 0 and not self.echo:
            raise fault("max_tokens", "0 is only allowed with echo")
        return self

    @property
    def told_logprobs(self) -> int | None:
        return self.logprobs

    def to_sampling(self) -> SamplingParams:
        return replace(super().to_sampling(), prompt_logprobs=self.logprobs if self.echo else None)


class PromptBody(Wire):
    """A prompt or a conversation."""

    prompt: Text | None = None
    messages: Messages | None = None

    between: ClassVar[Rules] = (exactly_one("prompt", "messages"),)

    @model_validator(mode="after")
    def _check_one(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise fault("prompt", "give either prompt or messages")
        return self

    def to_prompt(self) -> Prompt:
        if self.prompt is not None:
            return TextPrompt(self.prompt)
        return ChatPrompt(tuple(message.to_engine() for message in self.messages or ()))


class RouteBody(PromptBody):
    """The body of `POST /v1/route`: a prompt or a conversation."""

    routing: Routing | None = Field(None, description="As in a request that is answered.")

    between: ClassVar[Rules] = (when(has(messages=GIVEN), has(messages=ASKING)),)

    def to_options(self) -> RouteOptions:
        return _options(self.routing)


def _options(given: Routing | None) -> RouteOptions:
    return ANY if given is None else given.to_options()
