"""The FlexSwitch paper's recipe: soft masks that harden, and a bit-width per tensor (arXiv 2604.28109, Eq. 6-15).

Learned are, per tensor, the logits s⁺ and s⁻ of two thresholds, κ, whose softplus is the scale, and four logits w of
bit-widths; the loss is Σ‖M‖₁ / Σn + Σ w̄ / (8 T) + λ · L, with L from `store.objective` (Eq. 14). What is kept at the
end is softplus(κ) · Q(τ; b) where M > ½, with b the likeliest width.

The paper leaves open which λ gives which size. Here the size is given, falling to the budget from that of a dense
start: after every step all threshold logits move together, by what brings the hard masks to it, and λ follows those
moves, up where the loss would have kept too little. At the end the same move brings the encoded bytes to the budget.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from store.bas import WIDTHS, mean_width, shares
from store.calibrate import golden_section
from store.codecs.base import Loss
from store.codecs.flex_switch import bits_of, density_of
from store.lgs import hard_mask, logits_for, soft_mask, temperature
from store.objective import objective
from store.packed import PackedLevels, PackedTensor
from store.soft_student import SoftStudent
from store.student import Turns, nothing_fits
from store.teacher import Lesson, mean_kl

STEPS = 200
"""Of one lesson, 8 samples, each. The paper's 500 of 32 would take ten times as long: an hour and more of a core."""
GATE_RATE, WIDTH_RATE = 0.125, 0.25
"""Of Adam: of s and κ, and of w. The paper's 0.05 and 0.1 for 500 / 200 as many steps: with them κ, which moves by one
rate per step at most, would not reach the scales that sparse masks need."""
TEMPERATURE = 4.0
START = 0.05
"""Density of the first step."""
FALLEN = 0.8
"""Share of the steps after which the budget is the final one. κ needs the time: masks ten times as sparse need scales
seven times as large."""
FIRST_WEIGHT = {Loss.KL: 0.3, Loss.MSE: 0.05, Loss.CKA: 3.0}
"""λ at the start: the paper's for ViT."""
WEIGHT_RATE = 2.0
"""Of log λ, per unit that the threshold logits are moved by."""
_FIRST_SCALES, _LAST_FACTORS = (math.log(0.01), math.log(10.0)), (math.log(0.5), math.log(8.0))
_EVALUATIONS = 8
_HALVINGS = 10
_LARGEST_MOVE = 0.5
"""Of the threshold logits, that λ follows: a jump over a gap in the entries says nothing of it."""
_LEVELS_ROOM = 6
"""Bytes that the header may take more for a tensor of levels than for a ternary one."""
_TOLERANCE = 0.002
_ATTEMPTS = 8


class PaperCourse:
    """The steps, and what they learn.

    Args:
        student: with at least one matrix.
        lessons: what the fine-tune answered.
        room: bytes of the matrices.
        loss: what is lowered.
    """

    def __init__(self, student: SoftStudent, lessons: Sequence[Lesson], room: int, loss: Loss) -> None:
        self._student, self._lessons, self._turns, self._room, self._kind = student, lessons, Turns(lessons), room, loss
        self._weight = FIRST_WEIGHT[loss]
        self._dense = max(1.0, float(bits_of(START, student.numel)) / (8 * room))
        tensors, device = len(student.counts), student.counts.device
        self._gates = self._start(density_of(8 * room * self._dense, student.numel)).requires_grad_(True)
        self._kappa = torch.zeros(tensors, device=device, requires_grad=True)
        self._widths = torch.zeros(tensors, len(WIDTHS), device=device, requires_grad=True)
        self._optimizer = torch.optim.Adam(
            [{"params": [self._gates, self._kappa], "lr": GATE_RATE}, {"params": [self._widths], "lr": WIDTH_RATE}]
        )

    def _start(self, density: float) -> torch.Tensor:
        """`[T, 2]`: the logits at which both sides of each tensor have that share of their entries."""
        student = self._student
        found = []
        for column, sign in enumerate((1, -1)):
            counts = student.counts * (sign * student.centres > 0)
            order = counts if sign < 0 else counts.flip(1)  # strongest first
            place = (order.cumsum(1) < density * counts.sum(1, keepdim=True)).sum(1)
            place = place.clamp(max=order.shape[1] - 1)
            row = place if sign < 0 else order.shape[1] - 1 - place
            threshold = sign * student.centres.gather(1, row[:, None])[:, 0]
            low, span = student.ranges.low[:, column], student.ranges.span[:, column]
            found.append((threshold - low) / span.clamp(min=1e-30))
        return logits_for(torch.stack(found, 1))

    def _values(self, done: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """M, `[T, CELLS]`; p, `[T, widths]`; and softplus(κ) · M ⊙ Q_M(τ), `[T, CELLS]`."""
        student, rho = self._student, temperature(done)
        mask = soft_mask(student.centres, self._gates, student.ranges, rho)
        mixture = shares(self._widths, rho)
        quantised = torch.einsum("tw,twc->tc", mixture * student.units, student.levels.float())
        return mask, mixture, F.softplus(self._kappa)[:, None] * mask * quantised

    def choose(self, done: Callable[[], None]) -> None:
        """Find one scale for all tensors to begin with."""

        def divergence(logarithm: float) -> float:
            with torch.no_grad():
                self._kappa.fill_(math.log(math.expm1(math.exp(logarithm))))
                self._student.write(self._values(0.0)[2])
            return mean_kl(self._student.model, self._lessons[:2])

        divergence(golden_section(divergence, *_FIRST_SCALES, _EVALUATIONS))
        self._hold(8.0 * self._room * self._dense)
        done()

    def step(self, done: float) -> None:
        """Write, listen, move, and come back to the budget; `done` is the share of the steps behind us."""
        student = self._student
        mask, mixture, values = self._values(done)
        student.write(values.detach())
        lesson = self._turns.next()
        loss = objective(self._kind, lesson.log_probs(student.model), lesson.teacher, TEMPERATURE)
        loss.backward()  # type: ignore[no-untyped-call]
        density = (mask * student.counts).sum() / student.numel
        width = mean_width(mixture).mean() / WIDTHS[-1]
        self._optimizer.zero_grad()
        # The whole over λ, so that Adam's moments of κ do not depend on it.
        total = (density + width) / self._weight + (values * student.slopes).sum()
        total.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        moved = self._hold(8.0 * self._room * self._dense ** (1 - min(1.0, done / FALLEN)))
        self._weight *= math.exp(-WEIGHT_RATE * max(-_LARGEST_MOVE, min(moved, _LARGEST_MOVE)))

    @torch.no_grad()
    def _hold(self, bits: float) -> float:
        """Move all threshold logits together to where the hard masks are expected to take that many bits; how far."""
        student = self._student
        levels, _ = self._stored()

        def excess(amount: float) -> bool:
            mask = hard_mask(student.centres, self._gates + amount, student.ranges)
            return student.expected_bits(mask, levels) > bits

        up, reach = excess(0.0), 0.05
        while reach < 100 and excess(reach if up else -reach) == up:
            reach *= 2
        low, high = (0.0, reach) if up else (-reach, 0.0)  # too much is kept at the lower one
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if excess(middle) else (low, middle)
        self._gates += high
        return high

    @torch.no_grad()
    def _stored(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Levels `[T, CELLS]` at the likeliest width of each tensor, and their units `[T]`, scaled by softplus(κ)."""
        student = self._student
        rows, width = torch.arange(len(student.levels)), self._widths.argmax(1).cpu()
        return student.levels[rows, width], student.units[rows, width] * F.softplus(self._kappa)

    @torch.no_grad()
    def finish(self) -> dict[str, PackedTensor]:
        """Fix masks and widths, within 0.2 % below the budget of bytes, and one factor on all scales, by line search;
        leave the model with what is stored.

        Raises:
            InvalidRequestError: nothing fits.
        """
        student, target = self._student, float(self._room)
        levels, units = self._stored()
        best: torch.Tensor | None = None
        largest = 0
        for _ in range(_ATTEMPTS):
            self._hold(8 * target)
            mask = hard_mask(student.centres, self._gates, student.ranges)
            packed = student.pack(mask, levels, units).values()
            size = sum(item.nbytes + _LEVELS_ROOM * isinstance(item, PackedLevels) for item in packed)
            if largest < size <= self._room:
                largest, best = size, mask
            if (1 - _TOLERANCE) * self._room <= size <= self._room:
                break
            target *= (1 - _TOLERANCE / 2) * self._room / max(size, 1)
        if best is None:
            raise nothing_fits()
        values = torch.where(best, levels * units[:, None], 0.0)

        def divergence(factor: float) -> float:
            student.write(values * math.exp(factor))
            return mean_kl(student.model, self._lessons[:2])

        factor = math.exp(golden_section(divergence, *_LAST_FACTORS, _EVALUATIONS))
        student.write(values * factor)
        return student.pack(best, levels, units * factor)
