"""The examples of `docs/clients.md`, as their readers run them: only addresses, keys and names are put in."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from bench.clients.target import Target

DOCS = Path(__file__).parents[2] / "docs" / "clients.md"
ADDRESS = "http://127.0.0.1:8000"


def block(title: str, language: str, text: str | None = None) -> str:
    """The code below a heading.

    Raises:
        LookupError: there is none.
    """
    found = re.search(
        rf"^## {re.escape(title)}$.*?^```{language}\n(.*?)^```$",
        DOCS.read_text(encoding="utf-8") if text is None else text,
        re.MULTILINE | re.DOTALL,
    )
    if found is None:
        raise LookupError(f"docs/clients.md has no {language} below {title!r}")
    return found.group(1)


def aimed(code: str, target: Target) -> str:
    """The code for this server instead of the demo's."""
    one, other = target.experts
    names = {
        ADDRESS: target.url,
        "none": target.key,
        "smollm2-135m-instruct": target.base,
        "num_es": one,
        "num_fr": other,
    }
    return re.sub("|".join(rf"{re.escape(name)}\b" for name in names), lambda found: names[found[0]], code)


def run_python(target: Target, title: str) -> None:
    """Run the Python below a heading, in this process."""
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(aimed(block(title, "python"), target), f"docs/clients.md, {title}", "exec"), names)
