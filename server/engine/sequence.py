"""One sequence in the engine: its tokens, its place in the KV cache and where its events go."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

import torch

from server.engine.types import EngineRequest, FinishReason, TokenEvent
from store.mix import Mix

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
    id: int = field(default_factory=lambda: next(_ids))
    state: SequenceState = SequenceState.LOADING
    tokens: list[int] = field(default_factory=list)
    """Prompt and output so far."""
    blocks: list[int] = field(default_factory=list)
    """KV cache blocks, in order."""
    computed: int = 0
    """How many of `tokens` have their keys and values in the cache."""
    generator: torch.Generator | None = None
    """Own random stream, so that a seed means the same whatever else is in the batch."""

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt)
        sampling = self.request.sampling
        if sampling.temperature > 0.0:
            self.generator = torch.Generator()
            if sampling.seed is None:
                self.generator.seed()
            else:
                self.generator.manual_seed(sampling.seed % (1 << 63))

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

    def append(self, token: int, stop_tokens: frozenset[int]) -> TokenEvent:
        """Take a sampled token and say what the client learns of it."""
        if token in stop_tokens:
            return TokenEvent(None, FinishReason.STOP)
        self.tokens.append(token)
        finish = FinishReason.LENGTH if self.output_length >= self.max_tokens else None
        return TokenEvent(token, finish)
