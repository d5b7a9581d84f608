"""What a step computes: how much of which sequences."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

from server.engine.sequence import Sequence


@dataclass(frozen=True)
class Work:
    """One sequence's share of a step: its next `count` tokens."""

    sequence: Sequence
    count: int

    @property
    def samples(self) -> bool:
        """Whether the step reaches the sequence's last token, so that a new one can be sampled."""
        return self.count == self.sequence.pending


@dataclass(frozen=True)
class Batch:
    """A step's work, that of one mix side by side; the base's comes first.

    Attributes:
        mixed: whether deltas are applied beside the weights; otherwise all work has one mix, to be merged.
    """

    work: list[Work]
    mixed: bool

    def rows(self) -> tuple[int, int]:
        """How many streams get their next token, and how many tokens of prompts there are. To be asked before the
        sequences take note of the step."""
        decodes = sum(item.sequence.decodes for item in self.work)
        return decodes, sum(item.count for item in self.work) - decodes

    def by_mix(self) -> list[Batch]:
        """The same work, one batch per mix."""
        return [Batch(list(work), self.mixed) for _, work in groupby(self.work, key=lambda item: item.sequence.mix)]
