"""The ways in which `flex-switch` can learn, by name. No torch."""

from __future__ import annotations

from enum import StrEnum


class FlexRecipe(StrEnum):
    """How an expert is learned.

    Attributes:
        BUDGET: ours, by hard masks of one bit within an exact budget: `store.learning` and `store.student`.
        PAPER: that of arXiv 2604.28109, by soft masks and a choice of bit-widths: `store.paper_course`.
    """

    BUDGET = "budget"
    PAPER = "paper"


class Quantiser(StrEnum):
    """What range the recipe `paper` divides into levels; `store.bas` has the formulas.

    Attributes:
        SIGNED: that of the larger magnitude on both sides of zero, so that no level crosses it.
        PAPER: from the tensor's lowest to its highest value, as published: at few bits a value may change its sign.
    """

    SIGNED = "signed"
    PAPER = "paper"
