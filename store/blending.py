"""aTLAS: how much of each expert goes into each tensor, learned from a few exemplars (arXiv 2407.02880).

base + Σ_k λ_k,t · τ_k,t with one coefficient λ per expert k and tensor t. The paper lowers the cross-entropy of
labelled examples; here each expert answers its own exemplars once, and the blend is brought near all of them: mean
KL(expert k ‖ blend) per answer token, by Adam. A step writes the blend into the model; the slope of a coefficient is
∂loss/∂W · τ.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from store.checkpoint import Checkpoint
from store.errors import CheckpointError
from store.task_vector import load_float32
from store.teacher import Lesson, listen, load_model, mean_kl

Deltas = Mapping[str, npt.NDArray[np.float32]]
"""Flat float32 deltas of one expert by name; a tensor that did not change is not there."""

START = 0.3
"""What every coefficient begins at: the strength at which sums of task vectors do best."""
EPOCHS = 8
_LEARNING_RATE = 0.03
"""Falls linearly to zero."""


@dataclass(frozen=True)
class Blend:
    """What was learned.

    Attributes:
        weights: of each expert, tensor → coefficient.
        kl_at_start, kl: mean over the experts of KL(expert ‖ blend) in nats per answer token of its exemplars, at the
            start and in the end.
    """

    weights: Sequence[Mapping[str, float]]
    kl_at_start: float
    kl: float


def learn_blend(
    folder: Path,
    base: Checkpoint,
    experts: Sequence[Deltas],
    exemplars: Sequence[Sequence[str]],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Blend:
    """Learn the coefficients. Deterministic; one model in memory, the deltas, and one tensor's gradient.

    Args:
        folder: of the base, with configuration and tokenizer.
        base: its checkpoint.
        experts: their deltas.
        exemplars: prompts of each expert, those that it is to go on answering as it does.
        progress: called with (done, total).

    Raises:
        CheckpointError: the base cannot be run as a causal language model.
    """
    tell = progress or (lambda _done, _total: None)
    model, tokenizer = load_model(folder, "the base", "atlas runs it; the other methods do without")
    student = _Student(model, base, experts)
    lessons: list[list[Lesson]] = []
    for own, prompts in enumerate(exemplars):
        tell(own, len(experts))
        student.write(student.alone(own))
        lessons.append(listen(model, tokenizer, prompts))
    total = EPOCHS * sum(map(len, lessons))
    coefficients = torch.full(student.shape, START, dtype=torch.float64)
    student.write(coefficients)
    kl_at_start = _mean(model, lessons)
    learned = coefficients.clone()
    optimizer = torch.optim.Adam([learned], lr=_LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total)
    tokens = [sum(len(lesson.teacher) for lesson in own) for own in lessons]
    turns = [(own, lesson) for own, group in enumerate(lessons) for lesson in group]
    order = random.Random(0)
    with student:
        for done in range(total):
            if done % len(turns) == 0:
                shuffled = order.sample(turns, len(turns))
            own, lesson = shuffled[done % len(turns)]
            # All experts count alike, however long their answers are.
            scale = len(lessons[own]) / (tokens[own] * len(experts))
            (scale * lesson.kl(model)).backward()  # type: ignore[no-untyped-call]
            learned.grad = student.slopes
            optimizer.step()
            schedule.step()
            student.write(learned)
            tell(done + 1, total)
    kl = _mean(model, lessons)
    if not kl < kl_at_start:
        learned, kl = coefficients, kl_at_start
    if not math.isfinite(kl):
        raise CheckpointError("a blend of these experts gives no finite probabilities: they cannot be compared")
    rows = [dict(zip(student.names, row, strict=True)) for row in learned.tolist()]
    return Blend([{name: row[name] for name in own} for own, row in zip(experts, rows, strict=True)], kl_at_start, kl)


def _mean(model: Any, lessons: Sequence[Sequence[Lesson]]) -> float:
    return sum(mean_kl(model, own) for own in lessons) / len(lessons)


class _Blended:
    """One tensor in the student: what any expert changes of it is base + Σ coefficient · delta."""

    def __init__(self, parameter: torch.Tensor, pristine: torch.Tensor, deltas: Sequence[Any]) -> None:
        self._target = parameter.detach().view(-1)
        own = [None if delta is None else np.flatnonzero(delta) for delta in deltas]
        union = np.unique(np.concatenate([indices for indices in own if indices is not None]))
        self._indices = torch.from_numpy(union).to(parameter.device)
        self._pristine = pristine.view(-1).to(parameter.device)[self._indices]
        self._parts = [
            (
                row,
                torch.from_numpy(np.searchsorted(union, indices)).to(parameter.device),
                torch.from_numpy(delta[indices]).to(parameter.device),
            )
            for row, (delta, indices) in enumerate(zip(deltas, own, strict=True))
            if indices is not None
        ]

    def write(self, coefficients: Sequence[float]) -> None:
        """From the base's own values: nothing accumulates from one step to the next."""
        values = self._pristine.clone()
        for row, places, delta in self._parts:
            values.index_add_(0, places, delta, alpha=coefficients[row])
        self._target[self._indices] = values.to(self._target.dtype)

    def slopes(self, gradient: torch.Tensor, out: torch.Tensor) -> None:
        """∂loss/∂coefficient of each expert into `out`, given ∂loss/∂parameter."""
        near = gradient.reshape(-1)[self._indices].float()
        for row, places, delta in self._parts:
            out[row] = float(near[places] @ delta)


class _Student:
    """The base's model with a blend for weights. As a context, backward passes leave `slopes`, `[experts, tensors]`."""

    def __init__(self, model: Any, base: Checkpoint, experts: Sequence[Deltas]) -> None:
        self._model = model.requires_grad_(False)
        # Else the slope of that token's row lacks its part as an input; chat templates are full of it.
        model.get_input_embeddings().padding_idx = None
        self._state: dict[str, torch.Tensor] = model.state_dict(keep_vars=True)
        self.names = sorted(set().union(*experts))
        if unknown := [name for name in self.names if name not in self._state]:
            raise CheckpointError(f"tensor {unknown[0]} of the base is no parameter of the model", param=unknown[0])
        self.shape = len(experts), len(self.names)
        self.slopes = torch.zeros(self.shape, dtype=torch.float64)
        self._tensors = [
            _Blended(self._state[name], load_float32(base.tensors[name]), [expert.get(name) for expert in experts])
            for name in self.names
        ]
        self._hooks: list[Any] = []

    def alone(self, own: int) -> torch.Tensor:
        """The coefficients of one expert by itself."""
        found = torch.zeros(self.shape, dtype=torch.float64)
        found[own] = 1.0
        return found

    @torch.no_grad()
    def write(self, coefficients: torch.Tensor) -> None:
        for tensor, column in zip(self._tensors, coefficients.T.tolist(), strict=True):
            tensor.write(column)

    def __enter__(self) -> None:
        def collect(column: int, parameter: torch.Tensor) -> None:
            assert parameter.grad is not None
            self._tensors[column].slopes(parameter.grad, self.slopes[:, column])
            parameter.grad = None  # one tensor's gradient at a time is in memory

        for column, name in enumerate(self.names):
            parameter: Any = self._state[name].requires_grad_(True)
            self._hooks.append(parameter.register_post_accumulate_grad_hook(partial(collect, column)))

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._model.requires_grad_(False)
