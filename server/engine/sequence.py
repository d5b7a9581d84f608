"""One sequence in the engine: its tokens, its place in the KV cache and where its events go."""

from __future__ import annotations

import itertools
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TYPE_CHECKING

from server.engine.timing import Timing
from server.engine.token_counts import TokenCounts
from server.engine.types import EngineRequest, FinishReason, Likelihood, TokenEvent
from store.mix import Mix

if TYPE_CHECKING:
    from llguidance import LLMatcher

Event = TokenEvent | Exception

_ids = itertools.count()


class SequenceState(StrEnum):
    LOADING = "loading"
    """Waits for an expert of its mix to be decoded."""
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False)
class Sequence:
    """A request on its way through the engine. Touched by the engine's thread only."""

    request: EngineRequest
    max_tokens: int
    emit: Callable[[Event], None]
    eos: frozenset[int] = frozenset()
    """Tokens with which the model ends its turn."""
    grammar: LLMatcher | None = None
    """Knows which tokens may come next, where the request has a grammar."""
    id: int = field(default_factory=lambda: next(_ids))
    state: SequenceState = SequenceState.LOADING
    tokens: list[int] = field(default_factory=list)
    """Prompt and output so far."""
    blocks: list[int] = field(default_factory=list)
    """KV cache blocks, in order."""
    computed: int = 0
    """How many of `tokens` have their keys and values in the cache."""
    published: int = 0
    """How many of `blocks` others with the same beginning may find."""
    block_keys: list[bytes] = field(default_factory=list)
    """What the cache finds its full blocks by, as far as known; the first one is of no block."""
    cached_tokens: int | None = None
    """Tokens of the prompt that were found in the cache when it first ran."""
    seed: int = field(init=False)
    """Of its own random stream, unsigned 64 bit, so that a seed means the same whatever else is in the batch."""
    stop_tokens: frozenset[int] = field(init=False)
    """Tokens that end the answer and are not part of it."""
    counts: TokenCounts | None = None
    """Kept where the request has penalties."""
    scored: list[Likelihood] = field(default_factory=list)
    """Likelihoods of the prompt's first tokens, as far as they are known, where the request asks for them."""

    arrived: float = field(default_factory=time.monotonic)
    granted: float | None = None
    """When its experts were resident, by the same clock as all of these."""
    scheduled: float | None = None
    """When its first step began."""
    patching: float = 0.0
    """Seconds that its steps up to its first token spent on building weights."""
    is_timed: bool = False
    """Whether its times have been told."""

    def __post_init__(self) -> None:
        sampling = self.request.sampling
        self.tokens = list(self.request.prompt)
        self.seed = secrets.randbits(64) if sampling.seed is None else sampling.seed % (1 << 64)
        self.stop_tokens = sampling.stop_tokens | (frozenset() if sampling.ignore_eos else self.eos)
        if sampling.penalises:
            self.counts = TokenCounts(self.tokens)
        if sampling.prompt_logprobs is not None:
            self.scored.append(Likelihood(self.tokens[0], None))

    @property
    def mix(self) -> Mix:
        return self.request.mix

    @property
    def output_length(self) -> int:
        return len(self.tokens) - len(self.request.prompt)

    @property
    def pending(self) -> int:
        """Tokens that the next steps must still run through the model before one can be sampled."""
        return len(self.tokens) - self.computed

    @property
    def decodes(self) -> bool:
        """Whether its next step computes one token, on what the cache holds of it."""
        return self.pending == 1 and self.computed > 0

    def to_score(self, count: int) -> range:
        """Which tokens of the prompt have their likelihood told by the logits of the next `count` tokens."""
        if self.request.sampling.prompt_logprobs is None:
            return range(0)
        # The logits at one position are about the next; after a preemption positions are computed a second time.
        return range(max(self.computed + 1, len(self.scored)), min(self.computed + count + 1, len(self.request.prompt)))

    def timing(self) -> Timing | None:
        """How it came to its first token; None but for the first time."""
        if self.is_timed:
            return None
        self.is_timed = True
        now = time.monotonic()
        granted = self.arrived if self.granted is None else self.granted
        scheduled = granted if self.scheduled is None else self.scheduled
        return Timing(self.arrived, granted, scheduled, now, self.patching)

    def told(self, event: TokenEvent) -> TokenEvent:
        """The event, with what only the first one tells."""
        timing = self.timing()
        return event if timing is None else replace(event, timing=timing, cached_tokens=self.cached_tokens or 0)

    def append(self, token: int, likelihood: Likelihood | None = None) -> TokenEvent:
        """Take a sampled token and say what the client learns of it."""
        prompt = tuple(self.scored) if self.output_length == 0 else ()
        if self.max_tokens == 0:
            return TokenEvent(None, FinishReason.LENGTH, prompt=prompt)
        if token in self.stop_tokens:
            return TokenEvent(None, FinishReason.STOP, likelihood, prompt)
        self.tokens.append(token)
        finish = FinishReason.LENGTH if self.output_length >= self.max_tokens else None
        if self.grammar is not None:
            self.grammar.consume_token(token)
            if self.grammar.is_stopped():  # nothing can follow
                finish = FinishReason.STOP
        return TokenEvent(token, finish, likelihood, prompt)
