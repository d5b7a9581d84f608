"""Learning an expert within a budget: the model runs on base + gated task vector, and hears how far off it is.

The fine-tune answers the exemplars once (`store.teacher`). The student begins as T-Switch at density 0.05, which is
close to the fine-tune already. Then every step writes what is kept into the model, compares its distribution over one
batch of the answers with the fine-tune's, and moves the scores of all candidates and the scale of each tensor, while
the budget falls. At last the choice is fixed to the byte, and only the scales learn on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch

from store import paper_course
from store.calibrate import golden_section
from store.checkpoint import Checkpoint
from store.codecs.base import Loss
from store.codecs.flex_recipe import FlexRecipe, Quantiser
from store.codecs.flex_switch import bits_of, density_of
from store.errors import InvalidRequestError
from store.objective import objective
from store.packed import PackedTensor
from store.soft_student import SoftStudent
from store.student import Beginner, Student, Turns
from store.teacher import Lesson, listen, load_model, mean_kl, spread

EXEMPLARS = 96
HELD_OUT = 16
STEPS = 200
CANDIDATES = 0.07
"""Share of each tensor that competes."""
START = 0.05
"""Density of the first step. There T-Switch is within a few thousandths of a nat of the fine-tune."""
FALLEN = 0.6
"""Share of the steps after which the budget is the final one."""
SETTLED = 0.8
"""Share of the steps after which the choice is fixed."""
NARROWED, SPARE = 5.0, 3.0
"""Once there are so many times more candidates than are kept, only those stay that a budget so many times as large
would keep."""
VOLUME_RATE, SHIFT_RATE, SCORE_RATE = 0.03, 0.05, 0.0035
"""Of the logarithm of a tensor's scale and of what is added to its scores, by Adam; and of each entry's score, in what
the entries kept do for the loss per step: the noise of eight samples drowns magnitudes if that is much larger."""
WIDTH = 0.15
"""Half width of the ramp around the threshold that tells a tensor's shift its slope."""
_SEARCH = math.log(0.2), math.log(5.0)
_EVALUATIONS = 7


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


class Course(Protocol):
    """A recipe, as `learn` follows it."""

    def choose(self, done: Callable[[], None]) -> None:
        """What comes before the first step; calls `done` once."""
        ...

    def step(self, done: float) -> None:
        """One step; `done` is the share of the steps behind us."""
        ...

    def finish(self) -> dict[str, PackedTensor]:
        """What was learned, as it is stored; the model is left with it."""
        ...


def learn(
    base: Checkpoint,
    tuned: Checkpoint,
    exemplars: Sequence[str],
    budget: int,
    *,
    loss: Loss = Loss.KL,
    recipe: FlexRecipe = FlexRecipe.BUDGET,
    quantiser: Quantiser = Quantiser.SIGNED,
    left_out: Collection[str] = (),
    progress: Callable[[str, int, int], None] | None = None,
) -> Learned:
    """Learn an expert whose data takes at most `budget` bytes. Deterministic.

    Args:
        base, tuned: the checkpoints; the tuned folder has a tokenizer.
        exemplars: example prompts. `EXEMPLARS` are learned from and `HELD_OUT` kept aside, if there are so many.
        budget: bytes of the data section; tiny tensors are quantised and come first.
        loss: what is lowered.
        recipe: how.
        quantiser: of the recipe `paper`.
        left_out: tensors that are not stored.
        progress: called with ("learn", done, total).

    Raises:
        CheckpointError: the fine-tune cannot be loaded or run as a causal language model.
        InvalidRequestError: the budget is too small for the tiny tensors, or to keep anything beside them.
    """
    model, tokenizer = load_model(tuned.folder, remedy="flex-switch learns from it; other codecs need not run it")
    chosen = spread(exemplars, EXEMPLARS + HELD_OUT)
    apart = chosen[:: max(2, len(chosen) // HELD_OUT)][:HELD_OUT] if len(chosen) >= 2 * HELD_OUT else []
    if not (seen := list(dict.fromkeys(prompt for prompt in chosen if prompt not in apart))):
        seen, apart = list(dict.fromkeys(chosen)), []  # they were all the same: none can be kept aside
    steps = paper_course.STEPS if recipe is FlexRecipe.PAPER else STEPS
    tell = _Steps(progress, 3 + steps)
    lessons = listen(model, tokenizer, seen)
    held_out = listen(model, tokenizer, apart)
    tell.one()
    student: Beginner
    begin: Callable[[Sequence[Lesson], int, Loss], Course]
    if recipe is FlexRecipe.PAPER:
        student = soft = SoftStudent(model, base, tuned, left_out, quantiser)
        begin = partial(paper_course.PaperCourse, soft)
    else:
        student = hard = Student(model, base, tuned, left_out)
        begin = partial(_Course, hard)
    room = budget - sum(item.nbytes for item in student.tiny.values())
    if room < student.tensors:
        raise InvalidRequestError(
            f"{budget} bytes are too few for this model: its norms and biases alone take {budget - room}; allow more",
            param="bits_per_param",
        )
    tensors: dict[str, PackedTensor] = {}
    if student.tensors:
        course = begin(lessons, room, loss)
        course.choose(tell.one)
        for step in range(steps):
            course.step(step / steps)
            tell.one()
        tensors = course.finish()
    kl, held_out_kl = mean_kl(model, lessons), mean_kl(model, held_out) if held_out else math.nan
    tell.end()
    return Learned({**student.tiny, **tensors}, kl, held_out_kl)


class _Steps:
    """Progress of the stage."""

    def __init__(self, progress: Callable[[str, int, int], None] | None, total: int) -> None:
        self._tell = progress or (lambda _stage, _done, _total: None)
        self._done, self._total = 0, total
        self._tell("learn", 0, total)

    def one(self) -> None:
        self._done += 1
        self._tell("learn", self._done, self._total)

    def end(self) -> None:
        """All is done, whether or not there was anything to do it with."""
        self._tell("learn", self._total, self._total)


class _Course:
    """The steps, and the optimiser of the scales."""

    def __init__(self, student: Student, lessons: Sequence[Lesson], room: int, loss: Loss) -> None:
        self._student, self._lessons, self._room, self._kind = student, lessons, room, loss
        self._turns = Turns(lessons)
        self._settled = False
        self._start = max(1.0, float(bits_of(START, student.numel)) / (8 * room))

    def choose(self, done: Callable[[], None]) -> None:
        """Make the gates, and find one factor on all scales to begin with."""
        student = self._student
        student.choose(min(1.0, max(CANDIDATES, 1.5 * density_of(8 * self._room, student.numel))))
        student.keep(8 * self._room * self._start)
        student.listen()
        some = self._lessons[:2]

        def divergence(volume: float) -> float:
            for gate in student.gates.values():
                gate.volume = volume
            student.write()
            return mean_kl(student.model, some)

        start = golden_section(divergence, *_SEARCH, _EVALUATIONS)
        self._start_with(torch.full((len(student.gates),), start, dtype=torch.float64))
        done()

    def _loss(self, lesson: Lesson) -> torch.Tensor:
        return objective(self._kind, lesson.log_probs(self._student.model), lesson.teacher)

    def step(self, done: float) -> None:
        """Keep, write, listen and move; `done` is the share of the steps behind us."""
        student = self._student
        if done < SETTLED:
            bits = 8 * self._room * self._start ** (1 - min(1.0, done / FALLEN))
            student.keep(bits)
            if student.candidates > NARROWED * student.kept:
                self._on_with(partial(student.narrow, SPARE * bits))
                student.keep(bits)
        elif not self._settled:
            self._on_with(partial(student.settle, self._room))
            self._settled = True
        for gate, volume in zip(student.gates.values(), self._volumes.tolist(), strict=True):
            gate.volume = volume
        student.write()
        self._loss(self._turns.next()).backward()  # type: ignore[no-untyped-call]
        self._volumes.grad = student.volume_slopes()
        self._shifts.grad = torch.zeros_like(self._shifts) if self._settled else student.shift_slopes(WIDTH)
        for group, rate in zip(self._optimizer.param_groups, (VOLUME_RATE, SHIFT_RATE), strict=True):
            group["lr"] = rate * min(1.0, 3.5 * (1 - done))
        before = self._shifts.clone()
        self._optimizer.step()
        if not self._settled:
            student.shift(self._shifts - before)
            student.credit(SCORE_RATE)

    def finish(self) -> dict[str, PackedTensor]:
        """What is kept, as it is stored."""
        return self._student.pack()

    def _on_with(self, drop: Callable[[], None]) -> None:
        """Drop candidates; the optimiser goes on with the tensors that are left."""
        student, before = self._student, list(self._student.gates)
        drop()
        student.listen()
        rows = [before.index(name) for name in student.gates]
        moments = [self._optimizer.state[values] for values in (self._volumes, self._shifts)]
        self._start_with(self._volumes[rows].clone())
        for values, moment in zip((self._volumes, self._shifts), moments, strict=True):
            if moment:
                averages = {key: moment[key][rows] for key in ("exp_avg", "exp_avg_sq")}
                self._optimizer.state[values] = {"step": moment["step"], **averages}

    def _start_with(self, volumes: torch.Tensor) -> None:
        self._volumes, self._shifts = volumes, torch.zeros_like(volumes)
        groups = [{"params": [self._volumes], "lr": VOLUME_RATE}, {"params": [self._shifts], "lr": SHIFT_RATE}]
        self._optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))
