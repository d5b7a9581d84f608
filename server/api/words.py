"""Texts that have rules of their own, as the description tells them. What checks them is further in,
with better words.
"""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import Field, JsonValue

from server.api.wire import Text
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
    Field(json_schema_extra={"maxItems": MAX_TAGS, "uniqueItems": True}),
]
Parents = Annotated[list[Digest], Field(json_schema_extra={"maxItems": MAX_PARENTS, "uniqueItems": True})]
MetadataValue = Annotated[Text, Field(json_schema_extra={"maxLength": MAX_METADATA_BYTES})]
Author = Annotated[Text, Field(json_schema_extra=schema_of(LINE_PATTERN) | {"maxLength": MAX_AUTHOR_BYTES})]
License = Annotated[Text, Field(json_schema_extra=schema_of(LINE_PATTERN) | {"maxLength": MAX_LICENSE_BYTES})]
METADATA: dict[str, JsonValue] = {"propertyNames": schema_of(KEY_PATTERN), "maxProperties": MAX_METADATA}
Exemplar = Annotated[Text, Field(json_schema_extra={"pattern": r"[^\s\x1c-\x1f\x85]"})]
"""A prompt; not only white space."""
