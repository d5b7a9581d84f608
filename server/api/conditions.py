"""Rules between fields, as JSON Schema says them: clients can check a request before they send it.

What enforces them are the validators of each body, whose messages are better.
"""

from __future__ import annotations

from pydantic.json_schema import JsonSchemaValue

Rules = tuple[JsonSchemaValue, ...]
"""All of which must hold."""

GIVEN: JsonSchemaValue = {"not": {"type": "null"}}
NOT_GIVEN: JsonSchemaValue = {"type": "null"}
TRUE: JsonSchemaValue = {"const": True}
SOME: JsonSchemaValue = {"type": "array", "minItems": 1}
NOT_SOME: JsonSchemaValue = {"anyOf": [{"type": "null"}, {"type": "array", "maxItems": 0}]}


def has(**fields: JsonSchemaValue) -> JsonSchemaValue:
    """All these fields are there, and so."""
    return {"properties": fields, "required": list(fields)}


def lacks(**fields: JsonSchemaValue) -> JsonSchemaValue:
    """Each of these fields is so, or missing."""
    return {"properties": fields}


def all_of(*rules: JsonSchemaValue) -> JsonSchemaValue:
    """What holds where each of these does."""
    return {"allOf": list(rules)}


def when(
    condition: JsonSchemaValue, then: JsonSchemaValue, otherwise: JsonSchemaValue | None = None
) -> JsonSchemaValue:
    """What must hold where a condition does, and where it does not."""
    return {"if": condition, "then": then} | ({} if otherwise is None else {"else": otherwise})


def exactly_one(*names: str) -> JsonSchemaValue:
    """One of these fields is given, and the others are not."""
    return {
        "oneOf": [
            {"properties": {other: GIVEN if other == name else NOT_GIVEN for other in names}, "required": [name]}
            for name in names
        ]
    }
