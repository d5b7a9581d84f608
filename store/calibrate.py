"""The calibrated knob: scales with which a compressed expert speaks as its fine-tune does.

The RMS knob preserves the norm of what trimming left over, which at low density is a small part of the task vector.
Here the fine-tune answers the exemplars, and the compressed expert should give those answers the same distribution:
mean KL(fine-tune ‖ compressed) per answer token. First one multiplier is searched for all tensors, then every tensor's
own is learned from there by gradient descent. Only scales change: positions, signs and size stay as they are.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from store.checkpoint import Checkpoint, CheckpointTensor
from store.errors import CheckpointError
from store.packed import PackedDense, PackedTensor, PackedTernary
from store.task_vector import load_float32
from store.teacher import Lesson, listen, load_model, mean_kl, spread

CALIBRATION_EXEMPLARS = 48
_SEARCH = (0.5, 12.0)
_EVALUATIONS = 10
_GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0
_EPOCHS = 6
_LEARNING_RATE = 0.05
"""Of the logarithms; falls linearly to zero. Most of the gain comes in the first two epochs."""


@dataclass(frozen=True)
class Calibration:
    """What was found.

    Attributes:
        multiplier: the best one for all tensors, on top of the RMS knob.
        multipliers: each ternary tensor's own.
        kl_at_one, kl_at_multiplier, kl: mean KL(fine-tune ‖ expert) in nats per answer token of the exemplars with the
            RMS knob, with the one multiplier, and with each tensor's own.
    """

    multiplier: float
    multipliers: Mapping[str, float]
    kl_at_one: float
    kl_at_multiplier: float
    kl: float


def calibrate(
    base: Checkpoint,
    tuned_folder: Path,
    tensors: Mapping[str, PackedTensor],
    exemplars: Sequence[str],
    *,
    progress: Callable[[str, int, int], None] | None = None,
) -> Calibration:
    """Find the multipliers of all ternary scales. Deterministic; one model in memory, and one tensor's gradient.

    Args:
        base: the base's checkpoint.
        tuned_folder: the fine-tune, with its tokenizer.
        tensors: the packed expert, scales from the RMS knob; at least one is ternary. Dense tensors are applied as
            they are.
        exemplars: example prompts; at most `CALIBRATION_EXEMPLARS` of them, evenly spaced, are used.
        progress: called with ("calibrate", done, total).

    Raises:
        CheckpointError: the fine-tune cannot be loaded or run as a causal language model.
    """
    model, tokenizer = load_model(tuned_folder, remedy="calibration runs it; the knob l1 does without, and rms")
    prompts = spread(exemplars, CALIBRATION_EXEMPLARS)
    tell = _Steps(progress)
    lessons = listen(model, tokenizer, prompts)
    tell.expect(_EVALUATIONS + 2 + _EPOCHS * len(lessons) + 1)
    student = _Student(model, base, tensors)
    seen: dict[float, float] = {}

    def divergence(log_multiplier: float) -> float:
        student.scale_all(math.exp(log_multiplier))
        seen[log_multiplier] = mean_kl(model, lessons)
        tell.one()
        return seen[log_multiplier]

    kl_at_one = divergence(0.0)
    golden_section(divergence, math.log(_SEARCH[0]), math.log(_SEARCH[1]), _EVALUATIONS)
    best = min(seen, key=lambda at: (seen[at], at))
    shared = dict.fromkeys(student.names, math.exp(best))
    own = student.learn(best, lessons, tell.one)
    kl = mean_kl(model, lessons)
    if not kl < seen[best]:  # too few exemplars to learn from, or a fine-tune that the one multiplier already matches
        own, kl = shared, seen[best]
    tell.one()
    return Calibration(math.exp(best), own, kl_at_one, seen[best], kl)


def golden_section(function: Callable[[float], float], low: float, high: float, evaluations: int) -> float:
    """Minimise a function of one minimum in [low, high] with that many (≥ 2) evaluations; returns the best argument."""
    left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
    at_left, at_right = function(left), function(right)
    for _ in range(evaluations - 2):
        if at_left <= at_right:
            high, right, at_right = right, left, at_left
            left = high - _GOLDEN * (high - low)
            at_left = function(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + _GOLDEN * (high - low)
            at_right = function(right)
    return left if at_left <= at_right else right


class _Steps:
    """Progress of the stage."""

    def __init__(self, progress: Callable[[str, int, int], None] | None) -> None:
        self._tell = progress or (lambda _stage, _done, _total: None)
        self._done, self._total = 0, 1
        self._tell("calibrate", 0, 1)

    def expect(self, total: int) -> None:
        self._total = total
        self.one()

    def one(self) -> None:
        self._done += 1
        self._tell("calibrate", self._done, self._total)


class _Sparse:
    """One ternary tensor in the student: `parameter.flat[indices] = pristine + multiplier · step`."""

    def __init__(self, parameter: torch.Tensor, base: CheckpointTensor, packed: PackedTernary, name: str) -> None:
        delta = packed.decode(name)
        self._target = parameter.detach().view(-1)
        self._indices = torch.from_numpy(delta.indices).long().to(parameter.device)
        self._pristine = _float32_at(base, delta.indices).to(parameter.device)
        self._step = (torch.from_numpy(delta.levels).float() * delta.scale).to(parameter.device)
        self.parameter = parameter

    def scale(self, multiplier: float) -> None:
        """From the base's own values: nothing accumulates from one multiplier to the next."""
        values = torch.add(self._pristine, self._step, alpha=multiplier)
        self._target[self._indices] = values.to(self._target.dtype)

    def slope(self, gradient: torch.Tensor) -> float:
        """∂loss/∂multiplier, given ∂loss/∂parameter."""
        return float(gradient.reshape(-1)[self._indices].float() @ self._step)


class _Student:
    """The loaded model with the fine-tune's weights replaced by base + multipliers × expert."""

    def __init__(self, model: Any, base: Checkpoint, tensors: Mapping[str, PackedTensor]) -> None:
        self._model = model.requires_grad_(False)
        state: dict[str, torch.Tensor] = model.state_dict(keep_vars=True)
        for name, tensor in base.tensors.items():
            if name in state:
                state[name].copy_(load_float32(tensor))
        self._sparse: dict[str, _Sparse] = {}
        for name, packed in tensors.items():
            if name not in state:
                raise CheckpointError(
                    f"tensor {name} of the checkpoint is no parameter of the loaded model", param=name
                )
            if isinstance(packed, PackedDense):
                state[name].copy_(torch.from_numpy(packed.decode(name).values) + load_float32(base.tensors[name]))
            elif isinstance(packed, PackedTernary):
                self._sparse[name] = _Sparse(state[name], base.tensors[name], packed, name)

    @property
    def names(self) -> Iterable[str]:
        """The ternary tensors."""
        return self._sparse.keys()

    def scale_all(self, multiplier: float) -> None:
        for sparse in self._sparse.values():
            sparse.scale(multiplier)

    def learn(self, start: float, lessons: Sequence[Lesson], step_done: Callable[[], None]) -> dict[str, float]:
        """Every tensor's own multiplier by Adam on the KL, and the model left at them.

        Args:
            start: logarithm of the multiplier that all begin at.
        """
        logs = torch.full((len(self._sparse),), start, dtype=torch.float64)
        slopes = torch.zeros_like(logs)
        optimizer = torch.optim.Adam([logs], lr=_LEARNING_RATE)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, _EPOCHS * len(lessons))

        def collect(row: int, sparse: _Sparse, parameter: torch.Tensor) -> None:
            assert parameter.grad is not None
            slopes[row] = sparse.slope(parameter.grad)
            parameter.grad = None  # one tensor's gradient at a time is in memory

        hooks: list[Any] = []
        for row, sparse in enumerate(self._sparse.values()):
            parameter: Any = sparse.parameter.requires_grad_(True)
            hooks.append(parameter.register_post_accumulate_grad_hook(partial(collect, row, sparse)))
        order = random.Random(0)
        self._scale_each(logs)
        for _ in range(_EPOCHS):
            for lesson in order.sample(lessons, len(lessons)):
                (lesson.kl(self._model) / len(lesson.teacher)).backward()  # type: ignore[no-untyped-call]
                logs.grad = slopes * logs.exp()
                optimizer.step()
                schedule.step()
                self._scale_each(logs)
                step_done()
        for hook in hooks:
            hook.remove()
        self._model.requires_grad_(False)
        return dict(zip(self._sparse, logs.exp().tolist(), strict=True))

    def _scale_each(self, logs: torch.Tensor) -> None:
        for sparse, multiplier in zip(self._sparse.values(), logs.exp().tolist(), strict=True):
            sparse.scale(multiplier)


def _float32_at(tensor: CheckpointTensor, indices: np.ndarray[Any, Any]) -> torch.Tensor:
    values = np.asarray(tensor.read().reshape(-1)[indices])
    if tensor.dtype == "BF16":
        return torch.from_numpy(values.astype(np.uint16, copy=False)).view(torch.bfloat16).float()
    return torch.from_numpy(values.astype(np.float32, copy=False))
