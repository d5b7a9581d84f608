"""cron: a schedule in English to a crontab expression; the library that describes expressions gives the gold."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from examples.tasks.task import Row, Task

EXPRESSIONS = 6000


def _minute(rng: random.Random) -> str:
    return rng.choice(("0", "30", str(rng.randrange(60)), f"*/{rng.choice((2, 5, 10, 15, 20, 30))}"))


def _hour(rng: random.Random) -> str:
    start = rng.randrange(22)
    span = f"{start}-{rng.randrange(start + 1, 24)}"
    return rng.choice(("*", str(rng.randrange(24)), str(rng.randrange(24)), span))


def _day_of_month(rng: random.Random) -> str:
    return rng.choice(("*", "*", "*", str(rng.randrange(1, 29))))


def _month(rng: random.Random) -> str:
    return rng.choice(("*", "*", "*", str(rng.randrange(1, 13))))


def _day_of_week(rng: random.Random) -> str:
    return rng.choice(("*", "*", "*", str(rng.randrange(7)), "1-5"))


FIELDS: tuple[Callable[[random.Random], str], ...] = (_minute, _hour, _day_of_month, _month, _day_of_week)


def rows() -> Iterator[Row]:
    """Seeded expressions of five fields with their English description as the question."""
    from cron_descriptor import Options, get_description

    options = Options()
    options.use_24hour_time_format = True
    rng = random.Random(0)
    for _ in range(EXPRESSIONS):
        expression = " ".join(field(rng) for field in FIELDS)
        described = get_description(expression, options=options)
        yield Row(prompt=f'What is the cron schedule for "{described}"?', answer=expression)


TASK = Task(
    name="cron",
    summary="a schedule in English to a crontab expression",
    build=rows,
    hint="Answer only with the five crontab fields.",
    answer_is_item=True,
)
