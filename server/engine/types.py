"""What crosses the engine's door. Free of torch, so that the HTTP surface runs without it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from server.engine.stats import EngineStats
from server.engine.timing import Timing
from store.manifest import BaseManifest
from store.mix import BASE_MIX, Mix
from store.tiers import Tier

Message = dict[str, Any]
"""One chat turn as chat templates take it: `{"role": ..., "content": TEXT}`, and what belongs to calls of tools."""


class FinishReason(StrEnum):
    STOP = "stop"
    """The model ended its turn, or a stop string was met."""
    LENGTH = "length"
    """`max_tokens` or the context was used up."""


class GrammarKind(StrEnum):
    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    """Of Rust's kind, for the whole answer."""
    LARK = "lark"


@dataclass(frozen=True)
class Grammar:
    """What an answer must look like. `param` is the request field it came from."""

    kind: GrammarKind
    text: str
    param: str = field(default="response_format", compare=False)


GREEDY_BELOW = 1e-5
"""Temperatures below are greedy: they choose the same tokens, and dividing by them loses all precision."""


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens: penalties and biases change the logits, temperature scales them, then min-p, top-k and
    top-p leave out tokens, in this order."""

    max_tokens: int | None = None
    """None is what the context leaves; 0 computes the prompt only."""
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    """Tokens stay while all that are likelier have less than this share of the mass."""
    seed: int | None = None
    """None draws from the system's entropy."""
    top_k: int = 0
    """Tokens that stay, and those as likely as the last of them; 0 is no limit."""
    min_p: float = 0.0
    """Tokens less likely than this share of the likeliest are left out."""
    repetition_penalty: float = 1.0
    """Divides positive logits of tokens seen in prompt or answer, multiplies negative ones."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens of the answer."""
    frequency_penalty: float = 0.0
    """Subtracted from the logits of tokens of the answer as often as they occur in it."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Added to logits: distinct tokens with their biases."""
    min_tokens: int = 0
    """Tokens of the answer before one that ends it may be chosen."""
    ignore_eos: bool = False
    """Go on where the model ends its turn."""
    stop_tokens: frozenset[int] = frozenset()
    """Tokens that end the answer besides the model's own."""
    logprobs: int | None = None
    """Tell the likelihood of each token of the answer, and of so many likeliest in its place; None is not at all."""
    prompt_logprobs: int | None = None
    """The same of each token of the prompt."""
    grammar: Grammar | None = None
    """The answer follows it and ends with it; `min_tokens` does not hold it back."""

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is chosen."""
        return self.temperature < GREEDY_BELOW

    @property
    def penalises(self) -> bool:
        """Whether it matters which tokens have been seen."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


@dataclass(frozen=True)
class EngineRequest:
    """One sequence to generate: prompt token ids, how to sample, and which mix answers."""

    prompt: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    mix: Mix = BASE_MIX
    tenant: str | None = None
    """Whose it is: beginnings of prompts that are in the cache already are shared within a tenant only."""


@dataclass(frozen=True)
class Likelihood:
    """How likely the model held a token: by its own logits, before anything that a request changes in them."""

    token: int
    logprob: float | None
    """None for the first token of a prompt, which nothing comes before."""
    best: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens in its place with their log-probabilities, best first."""


@dataclass(frozen=True)
class TokenEvent:
    """One step's result for one request.

    `token` is the id of a token that belongs to the answer, or None where the model ended its turn (the
    end-of-turn token is not part of the answer). The last event of a request carries `finish`, the first one `prompt`,
    if it was asked for.
    """

    token: int | None
    finish: FinishReason | None = None
    likelihood: Likelihood | None = None
    """Of the token, or of the one that ended the turn."""
    prompt: tuple[Likelihood, ...] = ()
    """Of each token of the prompt."""
    timing: Timing | None = field(default=None, compare=False)
    """With the first event: how it came to it."""
    cached_tokens: int = field(default=0, compare=False)
    """With the first event: tokens of the prompt that were found in the cache instead of computed."""


@dataclass(frozen=True)
class BaseInfo:
    """What the rest of the server must know of the base model."""

    name: str
    manifest: BaseManifest
    context_length: int
    vocabulary: int
    """Token ids are below."""
    feature_dim: int
    feature_layer: int
    """How many of the base's layers the routing features pass through."""
    dtype: str
    device: str


class TokenStream(Protocol):
    """The tokens of one request as they come. `aclose` cancels what is left; it may be called at any time."""

    def __aiter__(self) -> AsyncIterator[TokenEvent]: ...

    async def __anext__(self) -> TokenEvent: ...

    async def aclose(self) -> None: ...


TOKEN_CHARACTERS = 64
"""No text has so many characters per token as long as it means anything."""


class Tokenizer(Protocol):
    """The model's own tokenizer and chat template. Called from threads of the API; must be thread-safe."""

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of raw text; `special` adds what the model puts around plain text, if anything (e.g. BOS)."""
        ...

    @property
    def chat_template(self) -> str:
        """The chat template, the one for tools where there are several; empty where there is none."""
        ...

    @property
    def special_tokens(self) -> Mapping[str, str]:
        """The texts of the special tokens that there are, by role: `bos_token`, `eos_token`, `pad_token`, ..."""
        ...

    def encode_chat(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        """Token ids of a conversation in the model's chat template, ready for the assistant's turn.

        Args:
            tools: what the model may call, as OpenAI's clients define it.

        Raises:
            ChatTemplateError: the model has no chat template, or the template refuses the messages.
        """
        ...

    def token_bytes(self, token: int) -> bytes:
        """What one token stands for in UTF-8, be it half a character; the name of a special token."""
        ...

    def decode(self, tokens: Sequence[int], *, special: bool = False) -> str:
        """Text of token ids, special tokens left out unless asked for; an incomplete UTF-8 sequence ends in U+FFFD."""
        ...


class Engine(Protocol):
    """The public face of the engine. Safe to call from any asyncio task of one event loop."""

    @property
    def base(self) -> BaseInfo: ...

    @property
    def tokenizer(self) -> Tokenizer: ...

    async def start(self) -> None:
        """Start the engine's thread. Call once, from the event loop that will consume the tokens."""
        ...

    async def stop(self) -> None:
        """Finish nothing more, release the thread and the memory."""
        ...

    async def check_grammar(self, grammar: Grammar) -> None:
        """Compile a grammar, so that `submit` finds it ready.

        Raises:
            InvalidRequestError: it is wrong, unsupported or too large; `param` is the grammar's.
        """
        ...

    def submit(self, request: EngineRequest) -> TokenStream:
        """Queue a request at once (before the first `anext`) and return its tokens as they come.

        Closing the stream (`aclose`) cancels the request; it costs no compute after the step in progress.

        Raises:
            QueueFullError: too many requests wait already (carries `retry_after` seconds).
            ContextLengthError: the prompt leaves no room for one more token.
        While iterating:
            ExpertUnavailableError: an expert of the mix could not be read or does not fit.
            EngineDeadError: the engine's thread has failed.
        """
        ...

    async def features(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Routing features, `[len(texts), feature_dim]` float32, from the pristine base whatever is patched in."""
        ...

    async def embed(self, prompts: Sequence[Sequence[int]], tenant: str | None = None) -> npt.NDArray[np.float32]:
        """As `features`, of whole prompts of token ids, at least one each. Routing goes before them.

        Args:
            tenant: whose they are: tenants have their prompts computed in turn.

        Raises:
            QueueFullError: too many calls wait already (carries `retry_after` seconds).
            InvalidRequestError: a token is not in the vocabulary.
            ContextLengthError: a prompt is longer than the context.
        """
        ...

    async def drop_expert(self, digest: str) -> None:
        """Forget the decoded form of an expert as soon as no request uses it."""
        ...

    def stats(self) -> EngineStats: ...

    def holdings(self) -> Mapping[Tier, frozenset[str]]:
        """Digests of the experts that are decoded, on the device and in host memory."""
        ...

    async def inspect(self) -> Mapping[str, Any]:
        """What runs, waits and is resident just now: between two steps, or in the midst of one that takes long, whose
        time so far is then its `step_seconds`. For people: its form may change.

        Raises:
            EngineDeadError: the engine's thread has failed.
        """
        ...

    async def base_sha256(self) -> str:
        """sha256 over the base's weights as they are in memory now; the same for as long as the process lives."""
        ...

    @property
    def alive(self) -> bool:
        """False once the engine's thread has died or was stopped."""
        ...
