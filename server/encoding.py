"""Prompts become tokens, without holding up anybody else: short ones at once, long ones in threads of their own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from server.engine.types import TOKEN_CHARACTERS, Engine, Tokenizer
from server.prompts import Prompt
from store.errors import ContextLengthError

Result = TypeVar("Result")

_INLINE_CHARACTERS = 4096
"""Longer prompts are tokenised in a thread, so that they do not hold up other streams."""
_THREADS = 2
"""A megabyte takes seconds: however many of them come, everything else finds a thread."""


class Encoder:
    """Encodes for one engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="tokenise")

    async def encode(self, prompt: Prompt) -> list[int]:
        """The tokens of a prompt.

        Raises:
            ContextLengthError: it is so long that it need not be tokenised to know that it does not fit.
            ChatTemplateError: as `Tokenizer.encode_chat`.
        """
        length = self._engine.base.context_length
        if prompt.characters > TOKEN_CHARACTERS * length:
            raise ContextLengthError(
                f"this model's maximum context length is {length} tokens; "
                f"the prompt has {prompt.characters} characters",
                param=prompt.param,
            )
        if prompt.characters <= _INLINE_CHARACTERS:
            return prompt.encode(self._engine.tokenizer)
        return await self.apart(prompt.encode)

    async def apart(self, work: Callable[[Tokenizer], Result]) -> Result:
        """What some longer work with the tokenizer gives."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, self._engine.tokenizer)
