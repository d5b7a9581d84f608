"""What people say that no expert is for: texts of every kind, so that the router can tell "like nothing I know".

The texts in `background.txt` are written for this project: questions, requests, prose, sums, code, logs, small talk.
They are passed through the base like exemplars, and their centres compete with those of the experts.
"""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.resources import files

from router.variants import framed_text

FRAMES = 2
"""Frames per text: see `router.variants`."""


@cache
def background_texts() -> tuple[str, ...]:
    """The texts, each as it is and in FRAMES frames."""
    lines = (files("router") / "background.txt").read_text(encoding="utf-8").splitlines()
    framed = (framed_text(line, turn) for line in lines for turn in range(FRAMES))
    return tuple(dict.fromkeys((*lines, *framed)))


def background_key() -> str:
    """Identifies the texts."""
    return "background-" + hashlib.sha256("\0".join(background_texts()).encode()).hexdigest()[:16]
