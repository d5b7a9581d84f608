"""What a task is: rows, a split without leaks, an exact metric and a loose one that is fair to the base."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypedDict

TEST_ROWS = 200
TRAIN_ROWS = 3000
EXEMPLARS = 100


class Row(TypedDict):
    """One item: the whole user message and the only right answer."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Split:
    """Disjoint rows of one task; `test` has at most TEST_ROWS, `train` at most TRAIN_ROWS."""

    train: list[Row]
    test: list[Row]

    @property
    def exemplars(self) -> list[str]:
        """Example prompts (never test prompts) that tell a router what the expert is for."""
        return [row["prompt"] for row in self.train[:EXEMPLARS]]


@dataclass(frozen=True)
class Task:
    """A task family.

    `build` returns every row there is, in any order. `hint` is appended to the prompt when the untouched base
    is scored fairly; `classes` is set where the answer is one of two labels. `answer_is_item` says that two
    prompts with one answer are the same item (cron: a schedule has one expression), so that neither may be in
    train if the other is in test.
    """

    name: str
    summary: str
    build: Callable[[], Iterable[Row]]
    hint: str
    classes: tuple[str, ...] = ()
    answer_is_item: bool = False

    def split(self) -> Split:
        """The fixed split: sort, dedupe, shuffle with seed 0, first 200 test, leaks dropped, 3,000 train."""
        answers: dict[str, set[str]] = {}
        for row in self.build():
            answers.setdefault(row["prompt"], set()).add(row["answer"])
        # A prompt with two gold answers can be neither learned nor scored.
        rows = [Row(prompt=p, answer=a.pop()) for p, a in sorted(answers.items()) if len(a) == 1]
        random.Random(0).shuffle(rows)
        test = rows[:TEST_ROWS]
        seen = {row["answer"] for row in test} if self.answer_is_item else set()
        train = [row for row in rows[TEST_ROWS:] if row["answer"] not in seen]
        return Split(train=train[:TRAIN_ROWS], test=test)

    def score(self, answer: str, gold: str) -> bool:
        """Exact match, but for white space at the ends."""
        return answer.strip() == gold.strip()

    def fair_prompt(self, prompt: str) -> str:
        """The prompt with the answer's format spelled out, as one would ask a model that was not tuned."""
        return f"{prompt}\n{self.hint}"

    def fair_score(self, answer: str, gold: str) -> bool:
        """Loose match: the gold answer occurs in the output as whole words, whatever the case.

        With two classes, exactly one of them must occur: "sarcastic or serious?" names both and decides nothing.
        """
        if self.classes:
            return [c for c in self.classes if _contains(answer, c)] == [gold]
        return _contains(answer, gold)


def _contains(text: str, phrase: str) -> bool:
    pattern = rf"(?<!\w){re.escape(phrase.strip())}(?!\w)"
    return re.search(pattern, text, flags=re.IGNORECASE) is not None
