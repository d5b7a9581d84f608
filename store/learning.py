"""Learning an expert within a budget: the model runs on base + gated task vector, and hears how far off it is.

The fine-tune answers the exemplars once (`store.teacher`). Then every step writes the gated task vector into the model,
compares its distribution over one batch of those answers with the fine-tune's, and moves each tensor's gate. One model
and one tensor's gradient are in memory, and three bytes per entry of the task vector.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from store.checkpoint import Checkpoint
from store.codecs.flex_switch import Gate, along_the_budget, bits_of, gate_of, threshold_for
from store.codecs.quantised import Quantised
from store.codecs.raw import is_raw
from store.errors import CheckpointError, InvalidRequestError
from store.packed import PackedTensor
from store.task_vector import deltas_between, load_float32
from store.teacher import Lesson, listen, load_model, mean_kl, spread

EXEMPLARS = 64
HELD_OUT = 16
STEPS = 100
TEMPERATURE = 2.0
_START_DENSITY = 0.05
_ANNEALED = 0.6
"""Share of the steps after which the budget is the final one."""
_SHIFT_RATE, _VOLUME_RATE = 0.05, 0.03
_WIDTHS = 0.3, 0.1
"""Half width of the ramp, first and last."""
_TOLERANCE = 0.002
"""How far below the budget the result should stay at most."""
_ATTEMPTS = 6


@dataclass(frozen=True)
class Learned:
    """What came out.

    Attributes:
        tensors: the packed expert.
        kl: mean KL(fine-tune ‖ expert) in nats per answer token of the exemplars it learned from.
        held_out_kl: the same of exemplars it never saw; NaN where there were too few to spare any.
    """

    tensors: dict[str, PackedTensor]
    kl: float
    held_out_kl: float


def learn(
    base: Checkpoint,
    tuned: Checkpoint,
    exemplars: Sequence[str],
    budget: int,
    *,
    left_out: Collection[str] = (),
    progress: Callable[[str, int, int], None] | None = None,
) -> Learned:
    """Learn an expert whose data takes at most `budget` bytes. Deterministic.

    Args:
        base, tuned: the checkpoints; the tuned folder has a tokenizer.
        exemplars: example prompts. `EXEMPLARS` are learned from and `HELD_OUT` kept aside, if there are so many.
        budget: bytes of the data section; tiny tensors are quantised and come first.
        left_out: tensors that are not stored.
        progress: called with ("learn", done, total).

    Raises:
        CheckpointError: the fine-tune cannot be loaded or run as a causal language model.
        InvalidRequestError: the budget is too small even for the tiny tensors.
    """
    tell = progress or (lambda _stage, _done, _total: None)
    steps = STEPS
    tell("learn", 0, steps + 2)
    model, tokenizer = load_model(tuned.folder)
    chosen = spread(exemplars, EXEMPLARS + HELD_OUT)
    apart = chosen[:: max(2, len(chosen) // HELD_OUT)][:HELD_OUT] if len(chosen) >= 2 * HELD_OUT else []
    lessons = listen(model, tokenizer, [prompt for prompt in chosen if prompt not in apart])
    held_out = listen(model, tokenizer, apart)
    tell("learn", 1, steps + 2)
    student = _Student(model, base, tuned, left_out)
    bits = 8 * (budget - sum(item.nbytes for item in student.tiny.values()))
    if bits < 8 * len(student.gates):
        raise InvalidRequestError(
            f"{budget} bytes are too few for this model: its norms and biases alone take "
            f"{budget - bits // 8}; allow more",
            param="bits_per_param",
        )
    order: list[Lesson] = []
    shuffle = random.Random(0)
    for step in range(steps):
        order = order or shuffle.sample(lessons, len(lessons))
        student.step(order.pop(), bits, step / steps)
        tell("learn", step + 2, steps + 2)
    tensors = student.pack(bits / 8)
    kl, held_out_kl = mean_kl(model, lessons), mean_kl(model, held_out) if held_out else math.nan
    tell("learn", steps + 2, steps + 2)
    return Learned({**student.tiny, **tensors}, kl, held_out_kl)


class _Student:
    """The loaded model with base + gated task vector for weights, and the state of the learning."""

    def __init__(self, model: Any, base: Checkpoint, tuned: Checkpoint, left_out: Collection[str]) -> None:
        self._model = model.requires_grad_(False)
        self._base = base
        state: dict[str, torch.Tensor] = model.state_dict(keep_vars=True)
        self.tiny: dict[str, PackedTensor] = {}
        self.gates: dict[str, Gate] = {}
        self._parameters: dict[str, torch.Tensor] = {}
        for name, tau in deltas_between(base, tuned):
            if name not in state:
                raise CheckpointError(f"tensor {name} of the checkpoint is no parameter of the model", param=name)
            if not bool(torch.isfinite(tau).all()):
                raise CheckpointError(f"tensor {name} differs from the base by NaN or infinite values", param=name)
            pristine = load_float32(base.tensors[name])
            state[name].copy_(pristine)
            if name in left_out:
                continue
            if is_raw(tuple(tau.shape)):
                if (item := Quantised().compress(name, tau)) is not None:
                    self.tiny[name] = item
                    delta = item.decode(name)
                    values = torch.from_numpy(delta.levels).float() * delta.scale
                    pristine.view(-1)[torch.from_numpy(delta.indices).long()] += values
                    state[name].copy_(pristine)
            elif (gate := gate_of(tau)) is not None:
                self.gates[name] = gate
                self._parameters[name] = state[name]
        count = len(self.gates)
        self._values = torch.zeros(2, count, dtype=torch.float64)
        self._slopes = torch.zeros(2, count, dtype=torch.float64)
        self._costs = torch.zeros(count, dtype=torch.float64)
        rates = [{"params": [self._values[0]], "lr": _VOLUME_RATE}, {"params": [self._values[1]], "lr": _SHIFT_RATE}]
        self._optimizer = torch.optim.Adam(rates, betas=(0.9, 0.99))
        self._threshold, self._width = 0.0, _WIDTHS[0]
        for row, name in enumerate(self.gates):
            parameter: Any = self._parameters[name].requires_grad_(True)
            parameter.register_post_accumulate_grad_hook(partial(self._collect, row, self.gates[name]))

    def _collect(self, row: int, gate: Gate, parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        volume, shift, cost = gate.slopes(self._threshold, parameter.grad, self._width)
        parameter.grad = None  # one tensor's gradient at a time is in memory
        self._slopes[0, row], self._slopes[1, row], self._costs[row] = volume, shift, cost

    def step(self, lesson: Lesson, bits: float, done: float) -> None:
        """Write, listen and move; `done` is the share of the steps behind us."""
        start = max(bits, sum(bits_of(_START_DENSITY, gate.numel) for gate in self.gates.values()))
        falling = min(1.0, done / _ANNEALED)
        self._width = _WIDTHS[0] * (_WIDTHS[1] / _WIDTHS[0]) ** done
        self._write(threshold_for(list(self.gates.values()), start ** (1 - falling) * bits**falling))
        (lesson.kl(self._model, TEMPERATURE) / len(lesson.teacher)).backward()  # type: ignore[no-untyped-call]
        self._slopes[1] = along_the_budget(self._slopes[1], self._costs)
        slower = min(1.0, 3.5 * (1 - done))
        for row, group in enumerate(self._optimizer.param_groups):
            group["lr"] = (_VOLUME_RATE, _SHIFT_RATE)[row] * slower
            group["params"][0].grad = self._slopes[row].clone()
        self._optimizer.step()
        for row, gate in enumerate(self.gates.values()):
            gate.volume, gate.shift = float(self._values[0, row]), float(self._values[1, row])

    @torch.no_grad()
    def _write(self, threshold: float) -> None:
        self._threshold = threshold
        for name, gate in self.gates.items():
            gate.write(threshold, self._parameters[name], load_float32(self._base.tensors[name]))

    def pack(self, budget: float) -> dict[str, PackedTensor]:
        """The expert at the largest size that is within the budget, and the model left with it."""
        gates, target, largest = list(self.gates.values()), budget, -1
        best: tuple[float, dict[str, PackedTensor]] = (math.inf, {})
        for _ in range(_ATTEMPTS):
            threshold = threshold_for(gates, 8 * target)
            packed = {name: gate.pack(name, threshold) for name, gate in self.gates.items()}
            size = sum(item.nbytes for item in packed.values() if item is not None)
            if largest < size <= budget:
                largest = size
                best = threshold, {name: item for name, item in packed.items() if item is not None}
            if (1 - _TOLERANCE) * budget <= size <= budget:
                break
            target *= (1 - _TOLERANCE / 2) * budget / max(size, 1)
        self._write(best[0])
        return best[1]
