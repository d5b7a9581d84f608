"""A floor that holds: an expert that ends too far from its fine-tune is made again with more room."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from store.adapter import is_adapter
from store.codecs.base import CodecName
from store.codecs.choice import Recipe
from store.compress_rules import MOST_BITS, MOST_RANK
from store.convert import compress
from store.errors import InvalidRequestError
from store.floors import BELOW_FLOOR
from store.report import Report

TRIES = 5
"""Times that a fine-tune is compressed at most: the last budget is sixteen times the first."""


def compress_widening(base_folder: Path, tuned_folder: Path, out: Path, **options: Any) -> Report:
    """`store.convert.compress`, and again with twice the density, budget or rank for as long as a floor is not met.

    Returns:
        The report of the last try; `widened` says what each one before had asked for and how it ended. The header of
        the expert says what they had asked for.

    Raises:
        InvalidRequestError: as `compress`; the floor is still not met after `TRIES`, or the codec has nothing to widen.
    """
    asked: list[str] = []
    widened: list[str] = []
    while True:
        try:
            report = compress(base_folder, tuned_folder, out, widened=asked, **options)
        except InvalidRequestError as error:
            if error.code != BELOW_FLOOR or len(widened) + 1 == TRIES:
                raise
            key, now, wider = _wider(options, error, adapter=is_adapter(tuned_folder))
            asked.append(f"{key}={now:g}" if isinstance(now, float) else f"{key}={now}")
            widened.append(f"{asked[-1]}: {error.message.partition(',')[0]}")
            options = options | {key: wider}
        else:
            return replace(report, widened=tuple(widened))


def _wider(options: dict[str, Any], error: InvalidRequestError, *, adapter: bool) -> tuple[str, float, float]:
    """The setting that bounds the size, its value, and the next one, the largest there is included.

    Args:
        adapter: whether the fine-tune is one, whose own factors are all that there is.

    Raises:
        InvalidRequestError: `error` itself, where nothing is left to widen.
    """
    codec = options.get("codec") or CodecName.T_SWITCH
    if codec == CodecName.FLEX_SWITCH:
        if options.get("max_size") is not None:
            return "max_size", options["max_size"], 2 * options["max_size"]
        return _doubled("bits_per_param", options.get("bits_per_param") or Recipe.bits_per_param, MOST_BITS, error)
    if codec == CodecName.LOW_RANK and not (adapter and options.get("rank") is None):
        return _doubled("rank", options.get("rank") or Recipe.rank, MOST_RANK, error)
    if codec in (CodecName.T_SWITCH, CodecName.COMPEFT):
        return _doubled("density", options.get("density") or Recipe.density, 1.0, error)
    raise error


def _doubled(key: str, now: float, most: float, error: InvalidRequestError) -> tuple[str, float, float]:
    if now >= most:
        raise error
    return key, now, min(most, 2 * now)
