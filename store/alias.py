"""An alias: a name that points to an expert's name, whatever that points to. Kept among the records, under its own."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass

from store.expert_info import NAME_PATTERN
from store.record import ExpertRecord, record_from_json
from store.strict_json import FieldError, Fields, parse_json

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Alias:
    """Another name of an expert.

    Attributes:
        name: what requests may say.
        target: the expert's own name; never an alias.
        created: when it came to point there, seconds since 1970.
    """

    name: str
    target: str
    created: int


def parse_entry(name: str, data: bytes | None) -> ExpertRecord | Alias | None:
    """What a store keeps under a name; None, and a line in the log, if it is damaged, None too if there is nothing."""
    if data is None:
        return None
    try:
        fields = Fields(parse_json(data, "record"), "record")
        return _alias(name, fields) if fields.has("alias_of") else record_from_json(name, fields)
    except FieldError as error:
        _log.warning("the record of %s is damaged and ignored: %s %s", name, error.field, error.message)
        return None


def alias_to_json(alias: Alias) -> bytes:
    """What a store keeps. A reader that knows no aliases takes it for a damaged record, and lets it be."""
    document = {"name": alias.name, "alias_of": alias.target, "created": alias.created}
    return json.dumps(document, indent=1, sort_keys=True).encode("ascii") + b"\n"


def _alias(name: str, fields: Fields) -> Alias:
    if fields.text("name", max_bytes=64) != name:
        fields.fail("name", "is not the record's own")
    target = fields.text("alias_of", max_bytes=64, pattern=NAME_PATTERN)
    if target == name:
        fields.fail("alias_of", "is the alias itself")
    return Alias(name, target, fields.integer("created", low=0, high=2**53))
