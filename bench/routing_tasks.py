"""What routing is for: the score of the tasks through `model: auto`, against the same experts by name; and prompts that
need two experts at once.

Both go through a running server. The prompts of two skills ask for a number in French *and* in Spanish words; a right
half counts a half.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
from num2words import num2words

from bench.report import Row
from bench.routing_prompts import reformed
from bench.served import ask, serving
from examples.build import load_rows
from examples.tasks import TASKS

FORMS = ("templated", "bare")
BOTH = "Write the number {} in French words and in Spanish words."
BOTH_TOKENS = 64


def task_rows(base: Path, experts: Sequence[Path], cache: Path, n: int) -> list[Row]:
    """One row per task and form, then one per way to answer prompts of two skills."""
    with TemporaryDirectory() as folder:
        library = Path(folder) / "experts"
        library.mkdir()
        for file in experts:
            shutil.copy(file, library)
        arguments = ("--base", base, "--base-name", "base", "--experts", library, "--cache-dir", cache)
        with serving(*arguments, "--data-dir", Path(folder) / "data") as url:
            rows = [_scores(url, file.stem, form, n) for form in FORMS for file in experts]
            return [*rows, *_two_skills(url, n)]


def _scores(url: str, name: str, form: str, n: int) -> Row:
    task, rows = TASKS[name], load_rows(TASKS[name], "test")[:n]
    prompts = [reformed(name, row["prompt"], form, i) for i, row in enumerate(rows)]
    limit = 2 * max(len(row["answer"].split()) for row in rows) + 24
    found: dict[str, Any] = {"task": name, "form": form, "n": len(rows)}
    for model in (name, "auto"):
        answers = ask(url, model, prompts, limit)
        right = [task.score(answer.text, row["answer"]) for answer, row in zip(answers, rows, strict=True)]
        found["routed" if model == "auto" else "by name"] = sum(right) / len(right)
        if model == "auto":
            found["own expert"] = sum(answer.mix == f"{name}=1" for answer in answers) / len(answers)
    return found


def numbers_in_both(n: int) -> list[tuple[int, tuple[str, str]]]:
    """Held-out numbers, each in French and in Spanish words."""
    numbers = [int("".join(filter(str.isdigit, row["prompt"]))) for row in load_rows(TASKS["num_fr"], "test")[:n]]
    return [(number, (num2words(number, lang="fr"), num2words(number, lang="es"))) for number in numbers]


def _two_skills(url: str, n: int) -> list[Row]:
    numbers = numbers_in_both(n)
    prompts = [BOTH.format(number) for number, _ in numbers]
    ways: dict[str, dict[str, Any]] = {
        "base": {"model": "base"},
        "num_fr": {"model": "num_fr"},
        "num_es": {"model": "num_es"},
        "auto, top1": {"model": "auto"},
        "auto, soft": {"model": "auto", "routing": {"mode": "soft"}},
        "half of each": {
            "model": "auto",
            "experts": [{"id": "num_fr", "weight": 0.5}, {"id": "num_es", "weight": 0.5}],
        },
        "all of both": {"model": "auto", "experts": [{"id": "num_fr"}, {"id": "num_es"}]},
    }
    rows: list[Row] = []
    with httpx.Client(base_url=url, timeout=600) as http:
        for way, fields in ways.items():
            halves = 0
            for prompt, (_, pair) in zip(prompts, numbers, strict=True):
                body = {"messages": [{"role": "user", "content": prompt}], "temperature": 0, "max_tokens": BOTH_TOKENS}
                answer = http.post("/v1/chat/completions", json=body | fields).raise_for_status().json()
                text = answer["choices"][0]["message"]["content"].lower()
                halves += sum(half in text for half in pair)
            rows.append(
                {"task": "French and Spanish", "form": way, "n": len(prompts), "score": halves / 2 / len(prompts)}
            )
    return rows
