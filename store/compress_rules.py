"""What may be asked of `compress`, and what of it goes together: told before the work, by whoever asks. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import TypeVar

from store.codecs.base import CodecName, Loss
from store.codecs.flex_recipe import FlexRecipe, Quantiser
from store.codecs.t_switch import Knob
from store.errors import InvalidRequestError
from store.floors import Floors

MOST_BITS = 1.5
"""Bits per parameter of the base: a mask and signs of every entry take no more."""
MOST_RANK = 65536
_Word = TypeVar("_Word", bound=StrEnum)


def check_together(
    *,
    codec: str,
    knob: str | None,
    bits_per_param: float | None,
    max_size: int | None,
    tensor_density: Mapping[str, float],
    floors: Floors,
    exemplars: bool,
    labelled: bool,
    stands: bool,
) -> None:
    """Whether these settings go together, as far as can be told without the base.

    Args:
        exemplars, labelled: whether there are any.
        stands: whether the expert is to stand on another one.

    Raises:
        InvalidRequestError: they do not, or one of them is out of range; `param` names it.
    """
    floors.check_measurable(exemplars, labelled)
    chosen = codec_of(codec)
    knob_of(knob, exemplars=exemplars)
    if stands and chosen is CodecName.OVERWRITE:
        raise InvalidRequestError(
            "overwrite keeps the bits of weights of the base: it cannot stand on another expert", param="relative_to"
        )
    check_tensor_density(chosen, tensor_density)
    _check_budget(chosen, bits_per_param, max_size)
    if chosen is CodecName.FLEX_SWITCH and not exemplars:
        raise InvalidRequestError(f"{chosen} learns from exemplars; give some", param="exemplars")


def codec_of(word: str) -> CodecName:
    """The codec of that name.

    Raises:
        InvalidRequestError: there is none.
    """
    return _one_of(CodecName, word, "codec")


def loss_of(word: str) -> Loss:
    """The loss of that name.

    Raises:
        InvalidRequestError: there is none.
    """
    return _one_of(Loss, word, "loss")


def recipe_of(word: str) -> FlexRecipe:
    """How flex-switch learns, by name.

    Raises:
        InvalidRequestError: there is no such way.
    """
    return _one_of(FlexRecipe, word, "recipe")


def quantiser_of(word: str) -> Quantiser:
    """The quantiser of that name.

    Raises:
        InvalidRequestError: there is none.
    """
    return _one_of(Quantiser, word, "quantiser")


def knob_of(word: str | None, *, exemplars: bool) -> Knob:
    """The knob of that name; with None the best one there is: `calibrated` where there are exemplars, else `l1`.

    Raises:
        InvalidRequestError: there is none, or it needs exemplars.
    """
    if word is None:
        return Knob.CALIBRATED if exemplars else Knob.L1
    knob = _one_of(Knob, word, "knob")
    if knob is Knob.CALIBRATED and not exemplars:
        raise InvalidRequestError("the calibrated knob needs exemplars; give some, or take the l1 knob", param="knob")
    return knob


def check_tensor_density(codec: CodecName, densities: Mapping[str, float]) -> None:
    """Whether a codec can have other densities for some tensors, by glob over their names.

    Raises:
        InvalidRequestError: it has none of its own, or a density is not 0 to 1.
    """
    if densities and codec is CodecName.OVERWRITE:
        raise InvalidRequestError("overwrite keeps every change: nothing may be left out", param="tensor_density")
    for glob, density in densities.items():
        if not 0.0 <= density <= 1.0:
            raise InvalidRequestError(f"the density of {glob} must be 0 to 1, not {density}", param="tensor_density")
        if density and codec is not CodecName.T_SWITCH:
            raise InvalidRequestError(
                f"{codec} has no density of its own per tensor; {glob}=0 leaves a tensor out", param="tensor_density"
            )


def _check_budget(codec: CodecName, bits_per_param: float | None, max_size: int | None) -> None:
    if codec is not CodecName.FLEX_SWITCH and (bits_per_param is not None or max_size is not None):
        raise InvalidRequestError(
            f"only {CodecName.FLEX_SWITCH} fits a budget; {codec} has a density or a rank",
            param="max_size" if bits_per_param is None else "bits_per_param",
        )
    if bits_per_param is not None and max_size is not None:
        raise InvalidRequestError("give bits_per_param or max_size, not both", param="max_size")
    if bits_per_param is not None and not 0.0 < bits_per_param <= MOST_BITS:
        raise InvalidRequestError(
            f"bits_per_param must be above 0 and at most {MOST_BITS}, not {bits_per_param}", param="bits_per_param"
        )


def _one_of(kind: type[_Word], word: str, param: str) -> _Word:
    if word not in list(kind):
        raise InvalidRequestError(f"there is no {param} {word}; choose one of {', '.join(kind)}", param=param)
    return kind(word)
