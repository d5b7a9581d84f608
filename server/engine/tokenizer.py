"""The model's own tokenizer and chat template."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2.exceptions import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from server.engine.spelling import Spelling
from server.engine.types import Message
from store.errors import ChatTemplateError, CheckpointError

if TYPE_CHECKING:
    from llguidance import LLTokenizer


class ModelTokenizer:
    """transformers' tokenizer behind the `Tokenizer` protocol, made safe for threads."""

    def __init__(self, folder: Path) -> None:
        """Raises:
        CheckpointError: the folder holds no tokenizer.
        """
        try:
            self._tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
        except (ValueError, OSError, KeyError) as error:
            raise CheckpointError(f"transformers cannot load the base's tokenizer: {error}", param="base") from error
        # Encoding may set options of the Rust tokenizer, which fails while another thread encodes. Decoding only reads.
        self._lock = threading.Lock()
        self._spelling = Spelling(self._tokenizer)

    @property
    def eos_token_id(self) -> int | None:
        eos: int | None = self._tokenizer.eos_token_id
        return eos

    def for_grammars(self, vocabulary: int, ends: frozenset[int]) -> LLTokenizer:
        """The same tokenizer as llguidance wants it; takes a second.

        Raises:
            ValueError: it is of a kind that llguidance does not know.
        """
        from llguidance.hf import from_tokenizer  # the engine runs without it where nobody asks for a grammar

        if not isinstance(self._tokenizer, PreTrainedTokenizerFast):
            raise ValueError(f"{type(self._tokenizer).__name__} is not one of the tokenizers library")
        with self._lock:
            return from_tokenizer(self._tokenizer, n_vocab=vocabulary, eos_token=sorted(ends))

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        with self._lock:
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=special)
        return ids

    @property
    def chat_template(self) -> str:
        template = self._tokenizer.chat_template
        if isinstance(template, dict):
            template = template.get("tool_use") or template.get("default")
        return template or ""

    @property
    def special_tokens(self) -> Mapping[str, str]:
        named = self._tokenizer.special_tokens_map
        return {role: str(token) for role, token in named.items() if isinstance(token, str)}

    def encode_chat(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        if self._tokenizer.chat_template is None:
            raise ChatTemplateError("this base has no chat template; use /v1/completions", param="messages")
        try:
            text = self._tokenizer.apply_chat_template(
                list(messages), tools=[dict(tool) for tool in tools] or None, tokenize=False, add_generation_prompt=True
            )
        except (TemplateError, ValueError, TypeError) as error:
            raise ChatTemplateError(f"the chat template refuses these messages: {error}", param="messages") from error
        # The template has written every special token itself.
        return self.encode(str(text), special=False)

    def token_bytes(self, token: int) -> bytes:
        return self._spelling.bytes_of(token)

    def decode(self, tokens: Sequence[int], *, special: bool = False) -> str:
        text = self._tokenizer.decode(list(tokens), skip_special_tokens=not special, clean_up_tokenization_spaces=False)
        return str(text)
