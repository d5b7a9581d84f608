"""num_fr, num_es: digits to number words. The prompts differ in one word: a hard pair for a router."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import partial

from examples.tasks.task import Row, Task

NUMBERS = 3600


def rows(language: str, code: str) -> Iterator[Row]:
    """The same numbers for every language, spread over the magnitudes: 1-999,999, few of them tiny."""
    from num2words import num2words

    rng = random.Random(0)
    numbers: set[int] = set()
    while len(numbers) < NUMBERS:
        digits = rng.choice((2, 3, 3, 4, 4, 4, 5, 5, 6))
        numbers.add(rng.randrange(10 ** (digits - 1), 10**digits))
    for number in sorted(numbers):
        yield Row(prompt=f"Write the number {number} in {language} words.", answer=num2words(number, lang=code))


FRENCH = Task(
    name="num_fr",
    summary="digits to French number words",
    build=partial(rows, "French", "fr"),
    hint="Answer only with the number in French words, in lower case.",
)
SPANISH = Task(
    name="num_es",
    summary="digits to Spanish number words",
    build=partial(rows, "Spanish", "es"),
    hint="Answer only with the number in Spanish words, in lower case.",
)
