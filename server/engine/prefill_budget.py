"""How many tokens of prompts a step takes while streams decode, so that these hardly notice newcomers.

Sarathi-Serve (arXiv 2403.02310) cuts prompts into chunks that share steps with decodes, of a size that is found by
profiling beforehand. Here the size follows from the times of the steps themselves, and from how many requests wait.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Set
from dataclasses import dataclass

_KEPT = 8
"""Observations of each size: their median is what counts, so that a single slow step changes nothing."""
_FADING = 64
"""Observations after which one of another size counts half."""
_PIECES = 64
"""Most steps that a prompt is cut into, whatever is thought of their cost."""


@dataclass(frozen=True)
class Line:
    """Seconds = `fixed` + `each` × size; neither is negative."""

    fixed: float
    each: float

    def __call__(self, size: int) -> float:
        return self.fixed + self.each * size

    def size(self, seconds: float) -> float:
        """The largest size that takes no longer; below zero if even the fixed part does."""
        return math.inf if self.each <= 0 else (seconds - self.fixed) / self.each


class Observations:
    """Times of work of different sizes, the latest of every power of two."""

    def __init__(self, *, flat: bool) -> None:
        """Args:
        flat: what a single size tells of others: that they take as long, or else that they take in proportion.
        """
        self._flat = flat
        self._sizes: dict[int, tuple[int, deque[tuple[int, float]]]] = {}
        """Power of two → when the last one was noted, and the last ones."""
        self._count = 0
        self._line: Line | None = None

    def note(self, size: int, seconds: float) -> None:
        """Take in what work of that size, at least 1, has taken."""
        power = size.bit_length()
        _, latest = self._sizes.get(power, (0, deque[tuple[int, float]](maxlen=_KEPT)))
        latest.append((size, seconds))
        self._count += 1
        self._sizes[power] = self._count, latest
        self._line = None

    def powers(self) -> Set[int]:
        """Of which powers of two there are sizes."""
        return self._sizes.keys()

    def line(self) -> Line | None:
        """The line through the medians, by least squares of relative errors; None before the first observation."""
        if self._line is None and self._sizes:
            self._line = self._fitted()
        return self._line

    def _fitted(self) -> Line:
        points = []
        for when, latest in self._sizes.values():
            x = statistics.fmean(size for size, _ in latest)
            y = max(1e-9, statistics.median(seconds for _, seconds in latest))
            points.append((x, y, 0.5 ** min(60.0, (self._count - when) / _FADING) / y**2))
        total = sum(w for *_, w in points)
        mean_x, mean_y = (sum(point[axis] * point[2] for point in points) / total for axis in (0, 1))
        spread = sum(w * (x - mean_x) ** 2 for x, _, w in points)
        slope = sum(w * (x - mean_x) * (y - mean_y) for x, y, w in points) / spread if len(points) > 1 else 0.0
        if (len(points) == 1 and not self._flat) or slope * mean_x > mean_y:
            return Line(0.0, sum(w * x * y for x, y, w in points) / sum(w * x * x for x, _, w in points))
        return Line(mean_y, 0.0) if slope <= 0 else Line(mean_y - slope * mean_x, slope)


class PrefillBudget:
    """Bounds what is computed beside decodes by what it is expected to take.

    Every newcomer may lengthen a step of decodes by as much as one of the streams in it takes, and by `share` of it at
    least. So a lone newcomer lengthens the gaps between the tokens of four streams or more by `share` at most, and a
    crowd of newcomers, which many gaps would keep waiting for long, by more. Where the time is there whatever its
    prompt costs, a prompt gets 1 of 1 + 1 / `share` parts of it.

    The worst case: a step takes no less than 1/64 of the longest prompt, so a first token comes within 64 steps for its
    own prompt and each of those before it. And where having a prompt at all costs a step more than newcomers may take
    (one that no CUDA graph holds any more, say), it takes so many tokens at once that they cost at least half of that:
    cut smaller, prompts would cost the streams more, not less.

    For the engine's thread.
    """

    def __init__(self, share: float) -> None:
        """Args:
        share: 0 bounds nothing.
        """
        self.share = share
        self._decodes = Observations(flat=True)
        self._prompts = Observations(flat=False)
        """What prompts add to a step."""
        self._features = Observations(flat=False)
        self._tried: deque[int] = deque(maxlen=_KEPT)
        """Tokens of prompts of the last steps that had decodes beside them."""
        self._spent = 0.0
        """Seconds of routing features since the last step."""

    def note_step(self, decodes: int, prompt_tokens: int, seconds: float) -> None:
        """Take in what a step has taken, without what it spent on weights.

        Args:
            decodes, prompt_tokens: its rows.
        """
        self._spent = 0.0
        if not prompt_tokens:
            self._decodes.note(decodes, seconds)
            return
        line = self._decodes.line()
        if line is not None:
            self._prompts.note(prompt_tokens, seconds - line(decodes))
        if decodes:
            self._tried.append(prompt_tokens)

    def note_features(self, tokens: int, seconds: float) -> None:
        """Take in what the routing features of prompts of so many tokens have taken, before the next step."""
        self._features.note(tokens, seconds)
        self._spent += seconds

    def prompt_tokens(self, decodes: int, prompts: int, longest: int) -> int | None:
        """Most tokens of prompts in the next step; None if nothing bounds them.

        Args:
            decodes: streams that the step advances.
            prompts: how many requests it may begin or continue to read.
            longest: tokens of the longest of their prompts.
        """
        room = self._room(decodes, prompts)
        if room is None:
            return None
        cost = self._prompts.line()
        if cost is None:  # a token of a chunk costs no more than a row of a step of its own
            step = self._decodes.line()
            cost = Line(0.0, step(decodes) / decodes if step is not None else 0.0)
        wanted = cost.size(room - self._spent)
        if cost.fixed > room and cost.each:
            wanted = 0.5 * cost.fixed / cost.each
        # What is known of a few tokens says little of many: no step takes more than twice what has been tried.
        most = 2 * max(self._tried, default=_KEPT)
        tokens = max(1, -(-longest // _PIECES), int(min(wanted, most)))
        # Nor does a single size tell what is fixed of its cost: another one must be tried.
        return 2 * tokens if self._prompts.powers() == {tokens.bit_length()} else tokens

    def feature_tokens(self, decodes: int, prompts: int) -> int | None:
        """Most tokens of prompts to make routing features of before the next step; None if nothing bounds them. Where
        prompts wait too, half of what one newcomer may take."""
        room = self._room(decodes, 1)
        if room is None:
            return None
        cost = self._features.line()
        return 1 if cost is None else max(1, int(min(cost.size(room / 2 if prompts else room), 1 << 20)))

    def _room(self, decodes: int, newcomers: int) -> float | None:
        """Seconds by which newcomers may lengthen the next step."""
        step = self._decodes.line()
        if not self.share or not decodes or step is None:
            return None
        return step(decodes) * newcomers * max(self.share, 1 / decodes)
