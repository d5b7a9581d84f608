"""Labelled exemplars: prompts with the one right answer, which tell how much of a skill is kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from store.errors import InvalidRequestError
from store.exemplars import fault, lines_of, prompt_of

MAX_LABELLED = 1024
MAX_ANSWER_BYTES = 4096
_PARAM = "labelled"


@dataclass(frozen=True)
class Labelled:
    """A prompt and the answer that counts as right; white space at its ends does not matter."""

    prompt: str
    answer: str


def parse_labelled(data: bytes) -> list[Labelled]:
    """Read labelled exemplars from JSON lines.

    Each line has a prompt, in the shapes of `store.exemplars`, and `"answer": TEXT`. Other keys are ignored, empty
    lines are skipped, repetitions are dropped; the order is kept.

    Raises:
        TooLargeError: there is more than fits (`store.exemplars`).
        InvalidRequestError: a line is none of these; the message gives its number.
    """
    found: list[Labelled] = []
    for number, value in lines_of(data, _PARAM):
        prompt = prompt_of(value)
        answer = value.get("answer") if isinstance(value, dict) else None
        if prompt is None or not isinstance(answer, str):
            raise fault(_PARAM, number, 'give {"prompt": TEXT, "answer": TEXT}')
        found.append(Labelled(prompt, answer))
    return checked(found)


def checked(rows: Sequence[Labelled]) -> list[Labelled]:
    """Without repetitions.

    Raises:
        InvalidRequestError: there is none, or there are more than `MAX_LABELLED`; a prompt or an answer is empty, or
            too long; or one prompt has two answers.
    """
    found: dict[str, str] = {}
    for number, row in enumerate(rows, start=1):
        if not row.prompt.strip() or not row.answer.strip():
            raise fault(_PARAM, number, "the prompt or the answer is empty")
        if len(row.answer.encode()) > MAX_ANSWER_BYTES:
            raise fault(_PARAM, number, f"the answer is longer than {MAX_ANSWER_BYTES} bytes")
        if found.setdefault(row.prompt, row.answer) != row.answer:
            raise fault(_PARAM, number, "the prompt was there before with another answer")
    if not found:
        raise InvalidRequestError("there are no labelled exemplars", param=_PARAM)
    if len(found) > MAX_LABELLED:
        raise InvalidRequestError(
            f"there are {len(found)} labelled exemplars, at most {MAX_LABELLED} fit", param=_PARAM
        )
    return [Labelled(prompt, answer) for prompt, answer in found.items()]
