"""What is to be answered, in each of the forms that the API accepts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from server.engine.types import Message, Tokenizer
from store.errors import InvalidRequestError

_ROUTED_TOKENS = 1024
"""Of a prompt of token ids, those that become text for routing, which looks at its beginning."""


class Prompt(Protocol):
    """One prompt: how it becomes tokens, and which text of it says what it is about."""

    @property
    def param(self) -> str:
        """The request field it came from."""
        ...

    @property
    def characters(self) -> int:
        """How much text there is to tokenise."""
        ...

    def encode(self, tokenizer: Tokenizer) -> list[int]: ...

    def questions(self, tokenizer: Tokenizer) -> Sequence[str]:
        """The texts that routing looks at: what is asked now comes last, what was asked before stands in front."""
        ...

    def echo(self, tokenizer: Tokenizer) -> str:
        """The text as it is sent back in front of an answer."""
        ...


@dataclass(frozen=True)
class ChatPrompt:
    """A conversation; routing looks at its user messages."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()

    @property
    def param(self) -> str:
        return "messages"

    @property
    def characters(self) -> int:
        return sum(len(message["content"]) for message in self.messages) + len(str(self.tools))

    def encode(self, tokenizer: Tokenizer) -> list[int]:
        return tokenizer.encode_chat(self.messages, self.tools)

    def questions(self, _: Tokenizer) -> Sequence[str]:
        asked: list[str] = [message["content"] for message in self.messages if message["role"] == "user"]
        if not asked:
            raise InvalidRequestError("routing needs a message from the user", param="messages")
        return asked

    def echo(self, tokenizer: Tokenizer) -> str:
        return tokenizer.decode(self.encode(tokenizer))


@dataclass(frozen=True)
class TextPrompt:
    """Plain text to continue."""

    text: str
    param: str = "prompt"

    @property
    def characters(self) -> int:
        return len(self.text)

    def encode(self, tokenizer: Tokenizer) -> list[int]:
        return tokenizer.encode(self.text)

    def questions(self, _: Tokenizer) -> Sequence[str]:
        return (self.text,)

    def echo(self, _: Tokenizer) -> str:
        return self.text


@dataclass(frozen=True)
class TokenPrompt:
    """Token ids to continue."""

    tokens: tuple[int, ...]
    param: str = "prompt"

    @property
    def characters(self) -> int:
        return 0

    def encode(self, _: Tokenizer) -> list[int]:
        return list(self.tokens)

    def questions(self, tokenizer: Tokenizer) -> Sequence[str]:
        return (tokenizer.decode(self.tokens[:_ROUTED_TOKENS]),)

    def echo(self, tokenizer: Tokenizer) -> str:
        return tokenizer.decode(self.tokens)
