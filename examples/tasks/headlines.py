"""sarcasm: is a headline meant seriously? Close to the sentiment task in form, on purpose."""

from __future__ import annotations

import json
from collections.abc import Iterator

from examples.fetch import EVALS, fetch, read_member
from examples.tasks.task import Row, Task

MEMBER = "evals/registry/data/sarcasm/samples.jsonl"
LABELS = {"1": "sarcastic", "0": "serious"}


def rows() -> Iterator[Row]:
    for line in read_member(fetch(EVALS), MEMBER).decode().splitlines():
        sample = json.loads(line)
        headline = sample["input"][-1]["content"].strip()
        prompt = f"Is this headline sarcastic or serious? {headline}"
        yield Row(prompt=prompt, answer=LABELS[str(sample["ideal"])])


TASK = Task(
    name="sarcasm",
    summary="headline to sarcastic or serious",
    build=rows,
    hint="Answer with one word: sarcastic or serious.",
    classes=("sarcastic", "serious"),
)
