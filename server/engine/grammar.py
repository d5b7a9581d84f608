"""Grammars that answers must follow: compiled once, bounded in time, one matcher per answer.

llguidance knows which tokens may come next; the sampler leaves out all others. It is imported with the first grammar:
the engine runs without it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING

from server.engine.grammar_check import SECONDS, limits, source
from server.engine.types import Grammar
from store.errors import InvalidRequestError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

_KEPT = 64
_SHOWN = 300
"""Characters of the compiler's message that are passed on."""


class Grammars:
    """Compiled grammars, the most recently used ones kept.

    Args:
        tokenizer: makes the tokenizer that matchers need; called once, when the first grammar comes, for it takes a
            second.
    """

    def __init__(self, tokenizer: Callable[[], LLTokenizer]) -> None:
        self._make_tokenizer = tokenizer
        self._tokenizer: LLTokenizer | None = None
        self._compiled: OrderedDict[Grammar, LLMatcher] = OrderedDict()
        self._compiling = threading.Lock()
        self._door = threading.Lock()

    def matcher(self, grammar: Grammar) -> LLMatcher:
        """A fresh matcher. Blocks while the grammar is compiled, if it is not yet.

        Raises:
            InvalidRequestError: the grammar is wrong, unsupported, or too much work.
        """
        if (found := self._find(grammar)) is not None:
            return found
        with self._compiling:
            if (found := self._find(grammar)) is not None:
                return found
            compiled = self._compile(grammar)
        with self._door:
            self._compiled[grammar] = compiled
            if len(self._compiled) > _KEPT:
                self._compiled.popitem(last=False)
        return compiled.deep_copy()

    def has(self, grammar: Grammar) -> bool:
        """Whether `matcher` would not block."""
        with self._door:
            return grammar in self._compiled

    def _find(self, grammar: Grammar) -> LLMatcher | None:
        with self._door:
            if grammar not in self._compiled:
                return None
            self._compiled.move_to_end(grammar)
            return self._compiled[grammar].deep_copy()

    def _compile(self, grammar: Grammar) -> LLMatcher:
        if (fault := _fault(grammar)) is not None:
            raise InvalidRequestError(f"the grammar cannot be used: {fault[:_SHOWN]}", param=grammar.param)
        if self._tokenizer is None:
            try:
                self._tokenizer = self._make_tokenizer()
            except ValueError as error:
                raise InvalidRequestError(
                    f"this base's tokenizer cannot follow grammars: {error}", param=grammar.param
                ) from error
        from llguidance import LLMatcher

        matcher = LLMatcher(self._tokenizer, source(grammar.kind, grammar.text), log_level=0, limits=limits())
        if matcher.is_error():
            raise InvalidRequestError(
                f"the grammar cannot be used: {matcher.get_error()[:_SHOWN]}", param=grammar.param
            )
        return matcher


def _fault(grammar: Grammar) -> str | None:
    """What is wrong with a grammar, found out where it can be stopped."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", f"{__package__}.grammar_check"],
            input=json.dumps({"kind": grammar.kind, "text": grammar.text}),
            capture_output=True,
            text=True,
            timeout=4 * SECONDS,  # it limits its own processor time, which is what a busy machine cannot stretch
            check=True,
        )
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError):
        return f"it takes more than {SECONDS} seconds or too much memory to compile"
    error: str | None = json.loads(done.stdout)["error"]
    return error
