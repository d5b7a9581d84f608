"""What the routing benchmarks route: held-out prompts of the example tasks in three forms, and prompts of no task.

*templated*: as the task writes them, which is how the exemplars are written too. *bare*: the instruction is gone and
only its object is left; the two numeral tasks, whose object is a mere number, are reworded instead. *reworded*: another
instruction with the same meaning, before the object or after it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from bench.unrelated import held_out_prompts, unrelated_prompts
from examples.build import load_rows
from examples.tasks import TASKS

FORMS = ("templated", "bare", "reworded")
EXEMPLARS, TEST, UNRELATED = 100, 100, 500
QUICK_TASKS, QUICK_EXEMPLARS, QUICK_TEST, QUICK_UNRELATED = 4, 40, 5, 20

TEMPLATES: Mapping[str, str] = {
    "cron": 'What is the cron schedule for "{}"?',
    "ha_intent": "Which smart home intent is this? {}",
    "langid": "What language is this text? {}",
    "sarcasm": "Is this headline sarcastic or serious? {}",
    "sentiment": "Is this review positive or negative? {}",
    "spam": "Is this email spam or ham? {}",
    "num_fr": "Write the number {} in French words.",
    "num_es": "Write the number {} in Spanish words.",
}
"""What a prompt of each task looks like around its object."""

REWORDINGS: Mapping[str, tuple[str, ...]] = {
    "cron": (
        "Crontab line for this, please: {}",
        "{} - write that as a crontab entry",
        "I have a job that should run like this: {}. What goes into the crontab?",
    ),
    "ha_intent": (
        "Classify the intent of this voice command: {}",
        "{} -- which Home Assistant intent is meant?",
        "A user says to the assistant: {}. Name the intent.",
    ),
    "langid": (
        "Name the language of the following passage: {}",
        "{} (which language is that?)",
        "Identify the language. {}",
    ),
    "sarcasm": (
        "Decide whether this news title is satire: {}",
        "{} - satire or real news?",
        "Are they joking with this title? {}",
    ),
    "sentiment": (
        "Judge the tone of what this customer wrote: {}",
        "{} Did the customer like it?",
        "Good or bad opinion? {}",
    ),
    "spam": (
        "Should this mail go to the junk folder? {}",
        "{} Is that junk or legitimate mail?",
        "Filter this message for me: {}",
    ),
    "num_fr": ("How do you spell {} in French?", "{} in French, written out", "Spell out {} as the French say it."),
    "num_es": ("How do you spell {} in Spanish?", "{} in Spanish, written out", "Spell out {} as the Spanish say it."),
}
"""The same request in other words; rows take them in turn."""

AMBIGUOUS = ("num_fr", "num_es")
"""Tasks whose object alone does not say what is wanted."""


def subject(task: str, prompt: str) -> str:
    """The object of the instruction: what stands at `{}` in the task's template."""
    before, after = TEMPLATES[task].split("{}")
    found = re.fullmatch(re.escape(before) + "(.*)" + re.escape(after), prompt, flags=re.DOTALL)
    if found is None:
        raise ValueError(f"this is no prompt of {task}: {prompt}")
    return found.group(1)


def reformed(task: str, prompt: str, form: str, index: int) -> str:
    """The `index`-th held-out prompt of a task in one of the FORMS."""
    if form == "templated":
        return prompt
    if form == "bare" and task not in AMBIGUOUS:
        return subject(task, prompt)
    rewordings = REWORDINGS[task]
    return rewordings[index % len(rewordings)].format(subject(task, prompt))


@dataclass(frozen=True)
class RoutingPrompts:
    """Exemplars by task, held-out prompts by form and task, and prompts that belong to no task: those that the
    router was tuned on, and others."""

    exemplars: Mapping[str, list[str]]
    test: Mapping[str, Mapping[str, list[str]]]
    unrelated: list[str]
    held_out: list[str]

    @classmethod
    def load(cls, *, quick: bool = False) -> RoutingPrompts:
        """All eight tasks; a few prompts of four of them if `quick`."""
        tasks = list(TASKS)[: QUICK_TASKS if quick else None]
        rows = {name: load_rows(TASKS[name], "test")[: QUICK_TEST if quick else TEST] for name in tasks}
        train = {name: load_rows(TASKS[name], "train")[: QUICK_EXEMPLARS if quick else EXEMPLARS] for name in tasks}
        return cls(
            {name: [row["prompt"] for row in train[name]] for name in tasks},
            {
                form: {
                    name: [reformed(name, row["prompt"], form, i) for i, row in enumerate(rows[name])] for name in tasks
                }
                for form in FORMS
            },
            unrelated_prompts(UNRELATED)[: QUICK_UNRELATED if quick else None],
            held_out_prompts()[: QUICK_UNRELATED if quick else None],
        )
