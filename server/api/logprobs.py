"""Log-probabilities in the wire formats of either endpoint."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from typing_extensions import TypedDict

from server.engine.types import Likelihood, Tokenizer

_IMPOSSIBLE = -9999.0
"""JSON has no infinity; OpenAI writes this."""


class TopLogprob(TypedDict):
    """One of the likeliest tokens."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """A token that was chosen, and the likeliest in its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(TypedDict):
    """Chat's form: an entry per token of the answer, the one that ended it included."""

    content: list[TokenLogprob]
    refusal: None


class TextLogprobs(TypedDict):
    """Completions' form: parallel lists, an entry per token of the text, the one that ended it included."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


def chat_logprobs(likelihoods: Sequence[Likelihood], tokenizer: Tokenizer) -> ChatLogprobs:
    """Chat's form."""

    def entry(token: int, logprob: float | None) -> TopLogprob:
        spelled = tokenizer.token_bytes(token)
        return {"token": _shown(spelled), "logprob": _finite(logprob), "bytes": list(spelled)}

    content: list[TokenLogprob] = [
        {**entry(one.token, one.logprob), "top_logprobs": [entry(*other) for other in one.best]} for one in likelihoods
    ]
    return {"content": content, "refusal": None}


class TextLogprobsWriter:
    """Completions' form, piece by piece: offsets count from the beginning of the choice's text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._offset = 0
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")

    def write(self, likelihoods: Sequence[Likelihood]) -> TextLogprobs:
        """The next tokens."""
        written: TextLogprobs = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for one in likelihoods:
            spelled = self._tokenizer.token_bytes(one.token)
            written["tokens"].append(_shown(spelled))
            written["text_offset"].append(self._offset)
            if self._tokenizer.decode([one.token]):  # special tokens are not in the text
                self._offset += len(self._characters.decode(spelled))
            if one.logprob is None:
                written["token_logprobs"].append(None)
                written["top_logprobs"].append(None)
                continue
            top = {_shown(self._tokenizer.token_bytes(token)): _finite(value) for token, value in one.best}
            written["token_logprobs"].append(_finite(one.logprob))
            written["top_logprobs"].append({_shown(spelled): _finite(one.logprob)} | top)
        return written


def _shown(spelled: bytes) -> str:
    """Text, or `bytes:\\xe2\\x82`, as OpenAI writes a token that is not text: different tokens stay different keys."""
    try:
        return spelled.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)


def _finite(logprob: float | None) -> float:
    return _IMPOSSIBLE if logprob is None else max(logprob, _IMPOSSIBLE)
