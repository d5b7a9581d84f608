"""Texts that have rules of their own, as the description tells them. What checks them is further in,
with better words.
"""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import Field, JsonValue

from server.api.wire import Text, fault
from store.card import (
    KEY_PATTERN,
    LINE_PATTERN,
    MAX_AUTHOR_BYTES,
    MAX_LICENSE_BYTES,
    MAX_METADATA,
    MAX_METADATA_BYTES,
    MAX_PARENTS,
    MAX_TAGS,
    TAG_PATTERN,
)
from store.expert_info import DIGEST_PATTERN, NAME_PATTERN
from store.upload import FILENAME_PATTERN


def schema_of(pattern: re.Pattern[str]) -> dict[str, JsonValue]:
    """What a JSON Schema says of text that matches a pattern as a whole."""
    return {"pattern": f"^{pattern.pattern}$"}


Name = Annotated[Text, Field(json_schema_extra=schema_of(NAME_PATTERN))]
"""Of an expert, an alias or a tenant."""
Digest = Annotated[Text, Field(json_schema_extra=schema_of(DIGEST_PATTERN))]
"""A sha256."""
FileName = Annotated[Text, Field(json_schema_extra=schema_of(FILENAME_PATTERN))]
Tags = Annotated[
    list[Annotated[Text, Field(json_schema_extra=schema_of(TAG_PATTERN))]],
    Field(fail_fast=True, json_schema_extra={"maxItems": MAX_TAGS, "uniqueItems": True}),
]
Parents = Annotated[
    list[Digest], Field(fail_fast=True, json_schema_extra={"maxItems": MAX_PARENTS, "uniqueItems": True})
]
MetadataValue = Annotated[Text, Field(json_schema_extra={"maxLength": MAX_METADATA_BYTES})]


def not_too_many(entries: Any) -> Any:
    """What is said about an expert, before pydantic looks at each entry: as many may come as others go."""
    if isinstance(entries, dict) and len(entries) > 2 * MAX_METADATA:
        raise fault("metadata", f"has {len(entries)} entries; the limit is {MAX_METADATA}")
    return entries


Author = Annotated[Text, Field(json_schema_extra=schema_of(LINE_PATTERN) | {"maxLength": MAX_AUTHOR_BYTES})]
License = Annotated[Text, Field(json_schema_extra=schema_of(LINE_PATTERN) | {"maxLength": MAX_LICENSE_BYTES})]
METADATA: dict[str, JsonValue] = {"propertyNames": schema_of(KEY_PATTERN), "maxProperties": MAX_METADATA}
Exemplar = Annotated[Text, Field(json_schema_extra={"pattern": r"[^\s\x1c-\x1f\x85]"})]
"""A prompt; not only white space."""
