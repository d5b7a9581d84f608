"""Other forms of an expert's exemplars, so that a prompt is found which is worded otherwise than they are.

Exemplars of one expert mostly repeat one instruction. A router that has seen nothing else learns to look for those
words: prompts without them are far from everything. So each exemplar is also shown without the instruction that it
shares with others, and within a few words that say nothing of the task.
"""

from __future__ import annotations

import zlib
from collections import Counter, defaultdict
from collections.abc import Sequence

FRAMES = (
    "Please look at this: {}",
    "{} What do you think?",
    "I have the following for you. {}",
    "{} Please answer in a few words.",
    "Hello, here it is: {}",
    "{} - can you tell me?",
    "Question: {} Answer:",
    "{} Thanks for your help.",
)
"""Words around an exemplar. The background is put into the same ones, so that they speak for nobody."""

SHARED_BY = 0.9
"""A word belongs to a template if this share of the exemplars that begin (or end) alike have it in that place."""
LEAST_GROUP = 4
"""Fewer exemplars that begin alike are a coincidence, not a template."""
LEAST_WORDS = 2
"""What is left of an exemplar without its instruction must have so many words: a bare number is nobody's domain."""


def variants(exemplars: Sequence[str], *, frames: int) -> dict[str, str]:
    """Each form of the exemplars → the exemplar that it is a form of.

    The exemplars come first, then what is left of them without their instruction, then the same in `frames` frames
    each. The result depends on the set of exemplars only, but for its order.
    """
    texts = list(dict.fromkeys(exemplars))
    found = {text: text for text in texts}
    subjects = without_instruction(texts)
    for text, subject in zip(texts, subjects, strict=True):
        found.setdefault(subject, text)
    for text, subject in zip(texts, subjects, strict=True):
        for turn in range(frames):
            found.setdefault(framed_text(subject, turn), text)
    return found


def framed_text(text: str, turn: int) -> str:
    """The text in one of the FRAMES; which one depends on the text and the turn."""
    return FRAMES[(zlib.crc32(text.encode()) + 3 * turn) % len(FRAMES)].format(text)


def without_instruction(exemplars: Sequence[str]) -> list[str]:
    """Each exemplar without the words that it shares with the others at its beginning and at its end.

    Exemplars that begin with the same word are compared with each other, so that an expert may have several
    templates. Where too little would be left, only the beginning is taken off; where that leaves too little too,
    nothing is.
    """
    words = [text.split() for text in exemplars]
    groups: dict[str, list[int]] = defaultdict(list)
    for i, row in enumerate(words):
        groups[row[0] if row else ""].append(i)
    found = list(exemplars)
    for members in groups.values():
        if len(members) < LEAST_GROUP:
            continue
        rows = [words[i] for i in members]
        opening, closing = _shared(rows), _shared([row[::-1] for row in rows])
        for i, row in zip(members, rows, strict=True):
            start = _common(row, opening)
            stop = len(row) - _common(row[::-1], closing)
            for kept in (row[start:stop], row[start:]):
                if len(kept) >= LEAST_WORDS:
                    found[i] = " ".join(kept)
                    break
    return found


def _shared(rows: Sequence[Sequence[str]]) -> list[str]:
    """The longest sequence of words with which SHARED_BY of the rows begin."""
    shared: list[str] = []
    alike = list(rows)
    while True:
        alike = [row for row in alike if len(row) > len(shared)]
        following = Counter(row[len(shared)] for row in alike)
        word, count = following.most_common(1)[0] if following else ("", 0)
        if count < SHARED_BY * len(rows):
            return shared
        alike = [row for row in alike if row[len(shared)] == word]
        shared.append(word)


def _common(row: Sequence[str], prefix: Sequence[str]) -> int:
    """How many words of `prefix` the row begins with."""
    count = 0
    for word, expected in zip(row, prefix, strict=False):
        if word != expected:
            break
        count += 1
    return count
