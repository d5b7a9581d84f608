"""How clients say which tokens they want: OpenAI's parameters, and those of vLLM's that open models are used with."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Annotated

from pydantic import AfterValidator, Field

from server.api.structured import StructuredFields
from server.api.wire import Token, fault
from server.engine.types import SamplingParams

MAX_BIASES = 1024
MAX_STOP_TOKENS = 64
_LARGEST = 2**31 - 1


def _check_bias(bias: dict[str, float]) -> dict[str, float]:
    for key in bias:
        if not (key.isascii() and key.isdecimal() and key == str(int(key[:20])) and int(key) <= _LARGEST):
            raise fault("logit_bias", f"{key[:40]!r} is no token id: keys are token ids in decimal digits")
    return bias


Biases = Annotated[
    dict[str, Annotated[float, Field(ge=-100, le=100)]],
    AfterValidator(_check_bias),
    Field(json_schema_extra={"propertyNames": {"pattern": "^(0|[1-9][0-9]{0,9})$"}}),
]


class SamplingFields(StructuredFields, ABC):
    """Which tokens are chosen, in both endpoints. A null means the default."""

    temperature: float | None = Field(1.0, ge=0.0, le=2.0, description="0 is greedy.")
    top_p: float | None = Field(1.0, gt=0.0, le=1.0)
    top_k: int | None = Field(0, ge=-1, le=_LARGEST, description="The likeliest tokens that stay; 0 or -1: all.")
    min_p: float | None = Field(0.0, ge=0.0, le=1.0, description="Least share of the likeliest token's probability.")
    presence_penalty: float | None = Field(0.0, ge=-2.0, le=2.0)
    frequency_penalty: float | None = Field(0.0, ge=-2.0, le=2.0)
    repetition_penalty: float | None = Field(1.0, gt=0.0, le=10.0, description="Of tokens in prompt or answer.")
    logit_bias: Biases | None = Field(None, max_length=MAX_BIASES, description="Token id → what is added to its logit.")
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    min_tokens: int | None = Field(0, ge=0, le=_LARGEST, description="No token that ends the answer before.")
    ignore_eos: bool | None = Field(False, description="Go on where the model ends its turn.")
    stop_token_ids: list[Token] | None = Field(None, max_length=MAX_STOP_TOKENS)

    @property
    @abstractmethod
    def most_tokens(self) -> int | None:
        """Most tokens of an answer, if the client said so."""

    @property
    @abstractmethod
    def told_logprobs(self) -> int | None:
        """How many of the likeliest tokens to tell with each token of an answer; None to tell nothing."""

    def to_sampling(self) -> SamplingParams:
        """What the engine is told."""
        given = {name: getattr(self, name) for name in _AS_GIVEN if getattr(self, name) is not None}
        bias = tuple((int(token), value) for token, value in (self.logit_bias or {}).items() if value)
        return SamplingParams(
            max_tokens=self.most_tokens,
            logprobs=self.told_logprobs,
            grammar=self.to_grammar(),
            top_k=max(0, self.top_k or 0),
            logit_bias=bias,
            stop_tokens=frozenset(self.stop_token_ids or ()),
            **given,
        )


_AS_GIVEN = (
    "temperature",
    "top_p",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "min_tokens",
    "ignore_eos",
)
