"""Which exemplars an expert is made from, and which ones it is measured on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from store.calibrate import CALIBRATION_EXEMPLARS
from store.codecs.base import CodecName
from store.codecs.choice import CALIBRATED, Recipe
from store.codecs.t_switch import Knob
from store.errors import InvalidRequestError
from store.labelled import Labelled
from store.learning import EXEMPLARS, HELD_OUT
from store.teacher import spread

MEASURED = 32
"""Prompts that an expert is measured on at most."""
SPARED = HELD_OUT
"""Of too few exemplars to have any left over, how many are kept aside."""


@dataclass(frozen=True)
class Apart:
    """Exemplars in two parts.

    Attributes:
        seen: what the expert is made from.
        measured: what it is measured on; some of `seen` where there are too few to spare any.
    """

    seen: list[str]
    measured: list[str]

    @property
    def held_out(self) -> bool:
        """Whether the expert is made without those it is measured on."""
        return not set(self.seen) & set(self.measured)


def apart_for(recipe: Recipe, exemplars: Sequence[str]) -> Apart:
    """Which exemplars a recipe's codec is fitted to, and which it is measured on."""
    if recipe.codec is CodecName.FLEX_SWITCH:
        return spared(exemplars, EXEMPLARS + HELD_OUT)
    if recipe.codec in CALIBRATED and recipe.knob is Knob.CALIBRATED:
        return fitted(exemplars, CALIBRATION_EXEMPLARS)
    return unseen(exemplars)


def unseen_rows(labelled: Sequence[Labelled], seen: Sequence[str]) -> list[Labelled]:
    """The labelled exemplars that the expert is not made from.

    Raises:
        InvalidRequestError: there were some, and none is left.
    """
    known = set(seen)
    left = [row for row in labelled if row.prompt not in known]
    if labelled and not left:
        raise InvalidRequestError(
            "the expert is made from all of the labelled prompts: give others, to see what it keeps", param="labelled"
        )
    return left


def unseen(exemplars: Sequence[str]) -> Apart:
    """For methods that are not fitted to exemplars: all of them are news to the expert."""
    return Apart([], spread(exemplars, MEASURED))


def fitted(exemplars: Sequence[str], most: int) -> Apart:
    """For methods that are fitted to at most `most` of them, evenly spaced.

    What is left over is measured on; else, of 2 · `SPARED` exemplars or more, every n-th is kept aside.
    """
    chosen = spread(exemplars, most)
    left = [prompt for prompt in exemplars if prompt not in set(chosen)]
    if len(left) >= SPARED:
        return Apart(chosen, spread(left, MEASURED))
    return spared(exemplars, len(exemplars))


def spared(exemplars: Sequence[str], most: int) -> Apart:
    """For methods that keep aside every n-th of at most `most`, as `store.learning` does by itself."""
    chosen = spread(exemplars, most)
    if len(chosen) < 2 * SPARED:
        return Apart(chosen, spread(chosen, MEASURED))
    apart = chosen[:: max(2, len(chosen) // SPARED)][:SPARED]
    aside = set(apart)
    return Apart([prompt for prompt in chosen if prompt not in aside], apart)
