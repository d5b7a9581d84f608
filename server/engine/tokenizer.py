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

_PROBE = "  Déjà vu: <|im_start|>user 12345\n\tif (x):  return \u4f60\u597d 🙂</s>"


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
        # transformers sets options of the Rust tokenizer whenever it encodes, which fails while another thread does.
        # Decoding only reads, and so does the Rust tokenizer itself: nobody waits for another's long text.
        self._lock = threading.Lock()
        self._backend = _shared_backend(self._tokenizer)
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
        if self._backend is not None:
            found: list[int] = self._backend.encode_batch_fast([text], add_special_tokens=special)[0].ids
            return found
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
        except (TemplateError, ValueError, TypeError, RecursionError) as error:
            raise ChatTemplateError(f"the chat template refuses these messages: {error}", param="messages") from error
        # The template has written every special token itself.
        return self.encode(str(text), special=False)

    def token_bytes(self, token: int) -> bytes:
        return self._spelling.bytes_of(token)

    def decode(self, tokens: Sequence[int], *, special: bool = False) -> str:
        text = self._tokenizer.decode(list(tokens), skip_special_tokens=not special, clean_up_tokenization_spaces=False)
        return str(text)


def _shared_backend(tokenizer: PreTrainedTokenizerBase) -> Any:
    """The Rust tokenizer that several threads may encode with at once; None where there is none, or it alone does not
    give what transformers makes of it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    backend.no_truncation()
    backend.no_padding()
    for special in (True, False):
        if backend.encode_batch_fast([_PROBE], add_special_tokens=special)[0].ids != tokenizer.encode(
            _PROBE, add_special_tokens=special
        ):
            return None
    return backend
