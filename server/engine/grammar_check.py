"""Whether a grammar compiles: a process of its own, because some regular expressions keep a compiler busy for hours.

Reads `{"kind", "text"}` from its input and writes `{"error"}`, null if there is none. Imports nothing heavy.
"""

from __future__ import annotations

import json
import resource
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llguidance import LLParserLimits

SECONDS = 5
_MEMORY = 2 << 30

WHITESPACE = r"[ \t\r\n]{0,32}"
"""Between the parts of JSON. Bounded: a weak model would go on with spaces for ever."""


def limits() -> LLParserLimits:
    """Bounds on the work of one step and on what is kept; messages must not hold the parser's state."""
    from llguidance import LLParserLimits

    return LLParserLimits(max_lexer_states=50_000, max_grammar_size=100_000, verbose_errors=False)


def source(kind: str, text: str) -> str:
    """The grammar in llguidance's form.

    Raises:
        ValueError: it is not even JSON.
    """
    from llguidance import LLMatcher

    if kind == "json_schema":
        return LLMatcher.grammar_from_json_schema(text, overrides={"whitespace_pattern": WHITESPACE})
    return LLMatcher.grammar_from_regex(text) if kind == "regex" else text


def check(kind: str, text: str) -> str | None:
    """What is wrong with a grammar, if anything."""
    from llguidance import LLMatcher

    try:
        failed, messages = LLMatcher.validate_grammar_with_warnings(source(kind, text), None, limits=limits())
    except ValueError as error:
        return str(error)
    return messages[0] if failed else None


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    json.dump({"error": check(**json.load(sys.stdin))}, sys.stdout)
