"""The model that learns: the loaded fine-tune with base + gated task vector for weights."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from store.checkpoint import Checkpoint
from store.codecs.flex_switch import LOWEST, Gate, along_the_budget, log_magnitude, threshold_for
from store.codecs.quantised import Quantised
from store.codecs.raw import is_raw
from store.errors import CheckpointError, InvalidRequestError
from store.packed import PackedTensor
from store.task_vector import deltas_between, load_float32
from store.teacher import Lesson

_SAMPLE = 50_000
"""Entries that decide where a tensor's candidates end."""
_TOLERANCE = 0.002
"""How far below the budget the result should stay at most."""
_ATTEMPTS = 8


class Turns:
    """Lessons in an order that is shuffled anew whenever all were had. Deterministic."""

    def __init__(self, lessons: Sequence[Lesson]) -> None:
        self._lessons = lessons
        self._order: list[Lesson] = []
        self._shuffle = random.Random(0)

    def next(self) -> Lesson:
        self._order = self._order or self._shuffle.sample(self._lessons, len(self._lessons))
        return self._order.pop()


def nothing_fits() -> InvalidRequestError:
    """The error of a budget that the tiny tensors take."""
    return InvalidRequestError(
        "the budget is too small to keep anything of the fine-tune but its norms and biases; allow more",
        param="bits_per_param",
    )


class Beginner:
    """What every recipe starts from: the base's weights, but for the tiny tensors, quantised and written at once.

    Args:
        model: the fine-tune, in evaluation mode; its weights are overwritten.
        left_out: tensors that are not stored.

    Attributes:
        tiny: the tensors that are already packed.

    Raises:
        CheckpointError: a tensor is no parameter of the model, or not finite.
    """

    def __init__(self, model: Any, base: Checkpoint, tuned: Checkpoint, left_out: Collection[str]) -> None:
        self.model = model.requires_grad_(False)
        self._base, self._tuned = base, tuned
        self._state: dict[str, torch.Tensor] = model.state_dict(keep_vars=True)
        self.tiny: dict[str, PackedTensor] = {}
        self._gated: dict[str, float] = {}  # mean |τ| of the tensors that are learned
        self._hooks: list[Any] = []
        for name, tau in deltas_between(base, tuned):
            if name not in self._state:
                raise CheckpointError(f"tensor {name} of the checkpoint is no parameter of the model", param=name)
            if not bool(torch.isfinite(tau).all()):
                raise CheckpointError(f"tensor {name} differs from the base by NaN or infinite values", param=name)
            pristine = load_float32(base.tensors[name])
            if name not in left_out and is_raw(tuple(tau.shape)):
                if (item := Quantised().compress(name, tau)) is not None:
                    self.tiny[name] = item
                    delta = item.decode(name)
                    values = torch.from_numpy(delta.levels).float() * delta.scale
                    pristine.view(-1)[torch.from_numpy(delta.indices).long()] += values
            elif name not in left_out and bool(tau.any()):
                self._gated[name] = float(tau.abs().double().mean())
            self._state[name].copy_(pristine)

    @property
    def tensors(self) -> int:
        """Tensors with a gate."""
        return len(self._gated)

    @property
    def numel(self) -> int:
        """Elements of all tensors with a gate."""
        return sum(self._state[name].numel() for name in self._gated)

    def _hear(self, collectors: dict[str, Callable[[torch.Tensor], None]]) -> None:
        """From now on, hand each tensor's gradient to its collector after a backward pass, and forget it."""

        def collect(collector: Callable[[torch.Tensor], None], parameter: torch.Tensor) -> None:
            assert parameter.grad is not None
            collector(parameter.grad)
            parameter.grad = None

        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        for name, collector in collectors.items():
            parameter: Any = self._state[name].requires_grad_(True)
            self._hooks.append(parameter.register_post_accumulate_grad_hook(partial(collect, collector)))


class Student(Beginner):
    """The state of the learning: every tensor that is not tiny gets a gate.

    Attributes:
        gates: once `choose` was called.
    """

    def __init__(self, model: Any, base: Checkpoint, tuned: Checkpoint, left_out: Collection[str]) -> None:
        super().__init__(model, base, tuned, left_out)
        self.gates: dict[str, Gate] = {}

    @torch.no_grad()
    def choose(self, candidates: float) -> None:
        """Make the gates of the strongest entries of each tensor, and the base's weights everywhere.

        Args:
            candidates: share of each tensor.
        """
        for name, tau in deltas_between(self._base, self._tuned):
            if name not in self._gated:
                continue
            parameter, pristine = self._state[name], load_float32(self._base.tensors[name])
            score = log_magnitude(tau.view(-1))
            sample = score[:: max(1, len(score) // _SAMPLE)].sort().values
            lowest = sample[int((1 - candidates) * (len(sample) - 1))]
            indices = ((score >= lowest) & (score > LOWEST)).nonzero().view(-1)
            parts = indices, tau.view(-1)[indices].sign(), score[indices], pristine.view(-1)[indices]
            at, sign, kept, base = (part.to(parameter.device) for part in parts)
            self.gates[name] = Gate(tuple(tau.shape), at, sign, kept, base, self._gated[name])
        self._lay_out()

    def _lay_out(self) -> None:
        """Put all gates' scores behind each other."""
        lengths = [len(gate.score) for gate in self.gates.values()]
        self._borders = np.cumsum([0, *lengths])
        self._numels = np.array([gate.numel for gate in self.gates.values()])
        # Where norms and biases are all that differs, there is no gate.
        self.scores = torch.cat([gate.score for gate in self.gates.values()]) if self.gates else torch.zeros(0)
        self.gains = torch.zeros_like(self.scores)
        for gate, score in zip(self.gates.values(), torch.split(self.scores, lengths), strict=True):
            gate.score = score

    def listen(self) -> None:
        """From now on, backward passes leave in `gains` how fast the loss falls as each candidate grows."""
        parts = torch.split(self.gains, np.diff(self._borders).tolist())

        def collect(gate: Gate, gains: torch.Tensor, gradient: torch.Tensor) -> None:
            gains.copy_(gate.gains(gradient))

        self._hear(
            {name: partial(collect, gate, part) for (name, gate), part in zip(self.gates.items(), parts, strict=True)}
        )

    @property
    def candidates(self) -> int:
        """Entries that may be kept."""
        return len(self.scores)

    @property
    def kept(self) -> int:
        """Entries that are kept."""
        return sum(gate.kept for gate in self.gates.values())

    def credit(self, rate: float) -> None:
        """Add to the scores what each candidate did or would do for the loss, in units of what those kept do."""
        mask = torch.cat([gate.mask for gate in self.gates.values()])
        unit = self.gains[mask].square().mean().sqrt().clamp(min=1e-30)
        self.scores.add_(self.gains / unit, alpha=rate)

    def shift_slopes(self, width: float) -> torch.Tensor:
        """`[gates]` float64: ∂loss/∂shift, were all scores of a gate raised together and masks ramps of `2 · width`
        around the threshold; without its part along which the size would change."""
        near = (self.scores - self._threshold).abs_() < width
        lengths = np.diff(self._borders).tolist()
        on_ramp = zip(torch.split(near, lengths), torch.split(self.gains, lengths), strict=True)
        sums = [torch.stack([(gains * mask).sum(), mask.sum()]) for mask, gains in on_ramp]
        slopes, costs = torch.stack(sums, 1).double().cpu()
        return along_the_budget(-slopes, costs)

    def shift(self, amounts: torch.Tensor) -> None:
        """Raise all scores of each gate."""
        lengths = torch.from_numpy(np.diff(self._borders)).to(self.scores.device)
        self.scores.add_(amounts.float().to(self.scores.device).repeat_interleave(lengths))

    def volume_slopes(self) -> torch.Tensor:
        """`[gates]` float64: ∂loss/∂volume, after a backward pass."""
        parts = torch.split(self.gains, np.diff(self._borders).tolist())
        sums = [(part * gate.mask).sum() for part, gate in zip(parts, self.gates.values(), strict=True)]
        return -torch.stack(sums).double().cpu()

    def keep(self, bits: float) -> None:
        """Keep what is expected to take that many bits."""
        self._threshold = threshold_for(self.scores, self._borders, self._numels, bits)
        for gate in self.gates.values():
            gate.keep(self._threshold)

    @torch.no_grad()
    def write(self) -> None:
        for name, gate in self.gates.items():
            gate.write(self._state[name])

    def pack(self) -> dict[str, PackedTensor]:
        """What is kept, as it is stored."""
        packed = {name: gate.pack(name) for name, gate in self.gates.items()}
        return {name: item for name, item in packed.items() if item is not None}

    def narrow(self, bits: float) -> None:
        """Drop the candidates that would not be kept if so many bits could be spent.

        Raises:
            InvalidRequestError: none would be.
        """
        threshold = threshold_for(self.scores, self._borders, self._numels, bits)
        for gate in self.gates.values():
            gate.keep(math.inf)
        self.write()
        for gate in self.gates.values():
            gate.keep(threshold)
        self._forget()

    def _forget(self) -> None:
        for name in [name for name, gate in self.gates.items() if not gate.kept]:
            del self.gates[name]
        if not self.gates:
            raise nothing_fits()
        for gate in self.gates.values():
            gate.narrow()
        self._lay_out()

    def settle(self, budget: float) -> None:
        """Keep as much as fits into that many bytes, exactly counted, and drop all other candidates.

        Raises:
            InvalidRequestError: nothing fits.
        """
        target, best, largest = budget, math.inf, -1
        for _ in range(_ATTEMPTS):
            threshold = threshold_for(self.scores, self._borders, self._numels, 8 * target)
            for gate in self.gates.values():
                gate.keep(threshold)
            size = sum(item.nbytes for item in self.pack().values())
            if largest < size <= budget:
                largest, best = size, threshold
            if (1 - _TOLERANCE) * budget <= size <= budget:
                break
            target *= (1 - _TOLERANCE / 2) * budget / max(size, 1)
        for gate in self.gates.values():
            gate.keep(best)
        self.write()
        self._forget()
