"""The commands of the pages: fenced blocks in the order they stand, and the markers that keep some from being run.

A comment in the line before a block may say why it is not run, or only with the slow tests:

    <!-- not run: wants a Docker engine -->
    <!-- slow: compresses a fine-tune -->

One comment in a page may say that its commands are for a server that asks for keys:

    <!-- tested against: a server with keys -->
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parents[2]
SHELLS = ("sh", "bash", "shell", "console")
LANGUAGES = (*SHELLS, "python")
KEYS = "<!-- tested against: a server with keys -->"

_MARKER = re.compile(r"^<!-- (not run|slow): (.+?) -->$")
_ANY_MARKER = re.compile(r"<!--\s*(not.run|slow|tested)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Block:
    """Commands of one fence; `line` counts from 1, and `reason` says why it is not always run."""

    page: str
    line: int
    language: str
    text: str
    mark: str | None = None
    reason: str = ""

    @property
    def commands(self) -> str:
        """What a person would type."""
        if self.language != "console":
            return self.text
        return "".join(line[2:] for line in self.text.splitlines(keepends=True) if line.startswith("$ "))

    def runs(self, *, slow: bool) -> bool:
        return self.mark is None or (slow and self.mark == "slow")


def pages(root: Path = ROOT) -> list[str]:
    """README.md and everything below docs/, as paths below the root."""
    return ["README.md", *sorted(str(path.relative_to(root)) for path in root.glob("docs/**/*.md"))]


def blocks_of(page: str, text: str) -> list[Block]:
    """The blocks with commands.

    Raises:
        ValueError: a marker gives no reason, or no block with commands follows it.
    """
    lines = text.splitlines()
    blocks, used = [], set()
    for token in MarkdownIt().parse(text):
        language = token.info.split()[0] if token.type == "fence" and token.info.strip() else ""
        if language not in LANGUAGES:
            continue
        assert token.map is not None
        start = token.map[0]
        marker = _MARKER.match(lines[start - 1].strip()) if start else None
        if marker:
            used.add(start - 1)
        mark, reason = marker.groups() if marker else (None, "")
        blocks.append(Block(page, start + 1, language, token.content, mark, reason))
    for number, line in enumerate(lines):
        if _ANY_MARKER.search(line) and number not in used and line.strip() != KEYS:
            raise ValueError(f"{page}:{number + 1}: a marker without a reason, or without commands: {line.strip()}")
    return blocks
