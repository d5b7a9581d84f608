"""How close an expert comes to its fine-tune: the model is run as the fine-tune, as base + expert, and as the base.

What is run is what the file holds, decoded. The fine-tune's greedy answers to prompts are what the expert's are
compared with; labelled prompts tell what it scores.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from store.apply import add
from store.checkpoint import Checkpoint
from store.errors import CheckpointError
from store.labelled import Labelled
from store.measured import Measured, rounded
from store.packed import PackedTensor
from store.task_vector import load_float32
from store.teacher import Lesson, answers, listen, load_model, spread

SCORED = 200
"""Labelled prompts that are scored at most, evenly spaced."""
_SPARE_TOKENS = 4
"""Room beyond the longest right answer."""


def measure(
    base: Checkpoint,
    under: Checkpoint,
    tuned_folder: Path,
    packed: Mapping[str, PackedTensor],
    prompts: Sequence[str],
    *,
    held_out: bool,
    relative_error: float,
    labelled: Sequence[Labelled] = (),
    progress: Callable[[str, int, int], None] | None = None,
) -> Measured:
    """Run all three models. One of them is in memory at a time.

    Args:
        base: the base's checkpoint, whose score is what a gain is counted from.
        under: what the deltas are added to: the base, or the base with the experts that this one stands on.
        tuned_folder: the fine-tune, with its tokenizer.
        packed: the expert.
        prompts: what `kl` and `agreement` are measured on; may be empty.
        held_out: whether the expert was made without them.
        relative_error: of the report.
        labelled: at most `SCORED` of them, evenly spaced, are scored.
        progress: called with ("measure", done, total).

    Raises:
        CheckpointError: the fine-tune cannot be loaded or run as a causal language model, or gives no numbers.
    """
    tell = progress or (lambda _stage, _done, _total: None)
    tell("measure", 0, 3)
    model, tokenizer = load_model(tuned_folder)
    rows = spread(labelled, SCORED)
    lessons = listen(model, tokenizer, list(prompts)) if prompts else []
    fine_tune_score = _score(model, tokenizer, rows)
    tell("measure", 1, 3)
    _put(model, under, packed)
    kl, agreement = likeness(model, lessons) if lessons else (None, None)
    if kl is not None and not math.isfinite(kl):
        raise CheckpointError(f"{tuned_folder.name} gives no finite probabilities: its answers cannot be compared")
    score = _score(model, tokenizer, rows)
    tell("measure", 2, 3)
    base_score = None
    if rows:
        _put(model, base, {})
        base_score = _score(model, tokenizer, rows)
    tell("measure", 3, 3)
    return rounded(
        Measured(
            relative_error=relative_error,
            kl=kl,
            agreement=agreement,
            prompts=len(prompts) or None,
            held_out=held_out if prompts else None,
            score=score,
            base_score=base_score,
            fine_tune_score=fine_tune_score,
            labelled=len(rows) or None,
        )
    )


@torch.no_grad()
def likeness(model: Any, lessons: Sequence[Lesson]) -> tuple[float, float]:
    """Mean KL(fine-tune ‖ model) in nats per answer token, and the share of answers that are the model's own too.

    An answer is the model's own if at each of its tokens the model ranks first what the fine-tune does: greedy decoding
    gives it then, token by token. Both are read from one pass, laid out as the fine-tune's was.
    """
    total = 0.0
    tokens = answers_given = same = 0
    for lesson in lessons:
        found = lesson.log_probs(model)
        total += float(F.kl_div(found, lesson.teacher, log_target=True, reduction="sum"))
        tokens += len(found)
        other = found.argmax(-1) != lesson.teacher.argmax(-1)
        count = int(lesson.owners.max()) + 1
        differing = torch.zeros(count, dtype=torch.long, device=other.device).index_add_(0, lesson.owners, other.long())
        answers_given += count
        same += int((differing == 0).sum())
    return max(0.0, total / tokens), same / answers_given


def _score(model: Any, tokenizer: Any, rows: Sequence[Labelled]) -> float | None:
    """Share of right answers, 0 to 1; None without rows."""
    if not rows:
        return None
    longest = max(len(tokenizer(row.answer, add_special_tokens=False)["input_ids"]) for row in rows)
    given = answers(model, tokenizer, [row.prompt for row in rows], longest + _SPARE_TOKENS)
    return sum(text.strip() == row.answer.strip() for text, row in zip(given, rows, strict=True)) / len(rows)


@torch.no_grad()
def _put(model: Any, under: Checkpoint, packed: Mapping[str, PackedTensor]) -> None:
    """Write checkpoint + expert over the model's weights."""
    state: dict[str, torch.Tensor] = model.state_dict(keep_vars=True)
    for name, tensor in under.tensors.items():
        if name not in state:
            if name in packed:
                raise CheckpointError(f"tensor {name} of the checkpoint is no parameter of the model", param=name)
            continue
        value = load_float32(tensor)
        if name in packed:
            add(value, name, packed[name].decode(name), under)
        state[name].copy_(value)
