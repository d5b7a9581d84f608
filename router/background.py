"""What people say that no expert is for: texts of every kind, so that the router can tell "like nothing I know".

They are passed through the base like exemplars, and their centres compete with those of the experts. The texts of
`background.txt` are written for this project: questions, requests, prose, sums, code, logs, small talk. Those of
`background_generated.txt` a language model has made up by itself, asked nothing (`bench/background.py`): what is
shown to a router must not be what one thinks of while testing it.
"""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.resources import files

from router.variants import framed_text

FRAMES = 2
"""Frames of each written text: see `router.variants`."""


@cache
def background_texts() -> tuple[str, ...]:
    """The texts, the written ones also in FRAMES frames."""
    written, generated = _lines("background.txt"), _lines("background_generated.txt")
    framed = (framed_text(line, turn) for line in written for turn in range(FRAMES))
    return tuple(dict.fromkeys((*written, *framed, *generated)))


def background_key() -> str:
    """Identifies the texts."""
    return "background-" + hashlib.sha256("\0".join(background_texts()).encode()).hexdigest()[:16]


def _lines(name: str) -> list[str]:
    return (files("router") / name).read_text(encoding="utf-8").splitlines()
