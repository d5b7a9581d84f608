"""sentiment: a sentence from a product, film or restaurant review, positive or negative."""

from __future__ import annotations

import json
from collections.abc import Iterator

from examples.fetch import SENTIMENT, fetch, read_member
from examples.tasks.task import Row, Task

SITES = ("amazon", "imdb", "yelp")


def rows() -> Iterator[Row]:
    archive = fetch(SENTIMENT)
    for site in SITES:
        for item in json.loads(read_member(archive, f"package/test/fixtures/{site}.json")):
            text = " ".join(item["text"].split())
            answer = "positive" if item["class"] == 1 else "negative"
            yield Row(prompt=f"Is this review positive or negative? {text}", answer=answer)


TASK = Task(
    name="sentiment",
    summary="review sentence to positive or negative",
    build=rows,
    hint="Answer with one word: positive or negative.",
    classes=("positive", "negative"),
)
