"""A floor that holds: an expert that ends too far from its fine-tune is made again with more room."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from store.codecs.base import CodecName
from store.codecs.choice import Recipe
from store.convert import MOST_BITS, compress
from store.errors import InvalidRequestError
from store.floors import BELOW_FLOOR
from store.report import Report

TRIES = 5
"""Times that a fine-tune is compressed at most: the last budget is sixteen times the first."""


def compress_widening(base_folder: Path, tuned_folder: Path, out: Path, **options: Any) -> Report:
    """`store.convert.compress`, and again with twice the density or budget for as long as a floor is not met.

    Returns:
        The report of the last try; `widened` says what each one before had asked for and how it ended.

    Raises:
        InvalidRequestError: as `compress`; the floor is still not met after `TRIES`, or the codec has nothing to widen.
    """
    widened: list[str] = []
    while True:
        try:
            report = compress(base_folder, tuned_folder, out, **options)
        except InvalidRequestError as error:
            if error.code != BELOW_FLOOR or len(widened) + 1 == TRIES:
                raise
            key, now, wider = _wider(options, error)
            widened.append(f"{key}={now:g}: {error.message.partition(',')[0]}")
            options = options | {key: wider}
        else:
            return replace(report, widened=tuple(widened))


def _wider(options: dict[str, Any], error: InvalidRequestError) -> tuple[str, float, float]:
    """The setting that bounds the size, its value, and the next one, the largest there is included.

    Raises:
        InvalidRequestError: `error` itself, where nothing is left to widen.
    """
    codec = options.get("codec") or CodecName.T_SWITCH
    if codec == CodecName.FLEX_SWITCH:
        if options.get("max_size") is not None:
            return "max_size", options["max_size"], 2 * options["max_size"]
        now = options.get("bits_per_param") or Recipe.bits_per_param
        if now >= MOST_BITS:
            raise error
        return "bits_per_param", now, min(MOST_BITS, 2 * now)
    now = options.get("density") or Recipe.density
    if codec not in (CodecName.T_SWITCH, CodecName.COMPEFT) or now >= 1.0:
        raise error
    return "density", now, min(1.0, 2 * now)
