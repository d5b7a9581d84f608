"""What the maker of an expert says in its file: how it was made, what it is called, what it is for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from store.card import Card, card_from_json, card_to_json
from store.measured import Measured, measured_from_json, measured_to_json
from store.strict_json import Fields

NAME_PATTERN = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
DIGEST_PATTERN = re.compile(r"[0-9a-f]{64}")
MAX_EXEMPLARS = 1024
MAX_EXEMPLAR_BYTES = 8192
MAX_DESCRIPTION_BYTES = 2000
MAX_TOOL_BYTES = 100
_CODEC_PATTERN = re.compile(r"[a-z0-9][a-z0-9_-]{0,31}")
_MAX_CODEC_PARAMS = 32

CodecParams = Mapping[str, str | int | float | bool]


@dataclass(frozen=True, kw_only=True)
class ExpertInfo:
    """What the maker of an expert says about it.

    Attributes:
        codec, codec_params: the method, and the settings it was used with; informative, decoding needs neither.
        tool: what wrote the file, and its version.
        created: seconds since 1970, or None: equal input then gives equal bytes.
        name: the name it would like to be served under, or None; matches `NAME_PATTERN`.
        description: one line for people.
        exemplars: example prompts that tell what the expert is for.
        card: author, licence, lineage, tags and the like.
        relative_to: hex sha256 of the expert file that the deltas are added on top of; None for the base itself.
        measured: how close it comes to its fine-tune, or None.
    """

    codec: str
    codec_params: CodecParams = field(default_factory=dict)
    tool: str
    created: int | None = None
    name: str | None = None
    description: str = ""
    exemplars: tuple[str, ...] = ()
    card: Card = field(default_factory=Card)
    relative_to: str | None = None
    measured: Measured | None = None


def info_to_json(info: ExpertInfo) -> dict[str, object]:
    """The optional keys, in canonical order; what is not said is left out."""
    document: dict[str, object] = {}
    if info.created is not None:
        document["created"] = info.created
    if info.name is not None:
        document["name"] = info.name
    if info.description:
        document["description"] = info.description
    if info.exemplars:
        document["exemplars"] = list(info.exemplars)
    document |= card_to_json(info.card)
    if info.relative_to is not None:
        document["relative_to"] = info.relative_to
    if info.measured is not None:
        document["report"] = measured_to_json(info.measured)
    return document


def info_from_json(fields: Fields) -> dict[str, Any]:
    """What `ExpertInfo` is made of, by name.

    Raises:
        FieldError: naming the field.
    """
    return {
        "codec": fields.text("codec", max_bytes=32, pattern=_CODEC_PATTERN),
        "codec_params": _codec_params(fields),
        "tool": fields.text("tool", max_bytes=MAX_TOOL_BYTES),
        "created": fields.integer("created", low=0, high=2**53) if fields.has("created") else None,
        "name": fields.text("name", max_bytes=64, pattern=NAME_PATTERN) if fields.has("name") else None,
        "description": fields.text("description", max_bytes=MAX_DESCRIPTION_BYTES) if fields.has("description") else "",
        "exemplars": fields.strings("exemplars", max_items=MAX_EXEMPLARS, max_bytes=MAX_EXEMPLAR_BYTES)
        if fields.has("exemplars")
        else (),
        "card": card_from_json(fields),
        "relative_to": fields.text("relative_to", max_bytes=64, pattern=DIGEST_PATTERN)
        if fields.has("relative_to")
        else None,
        "measured": measured_from_json(fields.child("report")) if fields.has("report") else None,
    }


def _codec_params(fields: Fields) -> dict[str, str | int | float | bool]:
    params = fields.child("codec_params")
    if len(params.names()) > _MAX_CODEC_PARAMS:
        fields.fail("codec_params", f"has more than {_MAX_CODEC_PARAMS} entries")
    result: dict[str, str | int | float | bool] = {}
    for key in params.names():
        value = params.get(key)
        if isinstance(value, str):
            params.text(key, max_bytes=200)
        elif isinstance(value, int | float):
            if not abs(value) < 2**53:
                params.fail(key, "must be smaller than 2^53")
        else:
            params.fail(key, "must be a string, a number or a boolean")
        result[key] = value
    return result
