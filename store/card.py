"""What people say about an expert: author, licence, lineage, tags and free metadata."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from store.strict_json import FieldError, Fields

MAX_AUTHOR_BYTES = 200
MAX_LICENSE_BYTES = 100
MAX_TAGS = 32
MAX_PARENTS = 64
MAX_METADATA = 32
MAX_METADATA_BYTES = 1000
TAG_PATTERN = re.compile(r"[a-z0-9][a-z0-9._:/+-]{0,63}")
KEY_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,63}")
LINE_PATTERN = re.compile(r"[^\x00-\x1f\x7f-\x9f]*")
_DIGEST_PATTERN = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Card:
    """The part of an expert that is for people and programs that look for one. Nothing of it changes what it answers.

    Attributes:
        author: who made it; one line.
        license: an SPDX expression (`Apache-2.0`), or a word of one's own; one line.
        tags: what it can be found by; each matches `TAG_PATTERN`.
        parents: hex sha256 of the expert files it was made from.
        metadata: whatever else; keys match `KEY_PATTERN`.
    """

    author: str = ""
    license: str = ""
    tags: tuple[str, ...] = ()
    parents: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)


def card_to_json(card: Card) -> dict[str, object]:
    """Keys and values in canonical order; what is empty is left out."""
    given: dict[str, object] = {
        "author": card.author,
        "license": card.license,
        "tags": list(card.tags),
        "parents": list(card.parents),
        "metadata": dict(sorted(card.metadata.items())),
    }
    return {key: value for key, value in given.items() if value}


def card_from_json(fields: Fields) -> Card:
    """Read a card out of an object that may hold other keys too.

    Raises:
        FieldError: naming the field.
    """
    return Card(
        author=_line(fields, "author", MAX_AUTHOR_BYTES),
        license=_line(fields, "license", MAX_LICENSE_BYTES),
        tags=_words(fields, "tags", MAX_TAGS, TAG_PATTERN),
        parents=_words(fields, "parents", MAX_PARENTS, _DIGEST_PATTERN),
        metadata=_metadata(fields.child("metadata")) if fields.has("metadata") else {},
    )


def check_card(card: Card) -> None:
    """Raise FieldError if a file or a record could not carry the card."""
    card_from_json(Fields(card_to_json(card), "card"))


def _line(fields: Fields, key: str, max_bytes: int) -> str:
    if not fields.has(key):
        return ""
    text = fields.text(key, max_bytes=max_bytes)
    if not LINE_PATTERN.fullmatch(text):
        fields.fail(key, "must be one line without control characters")
    return text


def _words(fields: Fields, key: str, max_items: int, pattern: re.Pattern[str]) -> tuple[str, ...]:
    if not fields.has(key):
        return ()
    words = fields.strings(key, max_items=max_items, max_bytes=64)
    for word in words:
        if not pattern.fullmatch(word):
            fields.fail(key, f"has the entry {word!r}; each must match {pattern.pattern}")
    if len(set(words)) != len(words):
        fields.fail(key, "has an entry twice")
    return words


def _metadata(fields: Fields) -> dict[str, str]:
    found: dict[str, str] = {}
    for key in fields.names():
        if not KEY_PATTERN.fullmatch(key):
            raise FieldError(f"has the key {key[:64]!r}; each must match {KEY_PATTERN.pattern}", "metadata")
        found[key] = fields.text(key, max_bytes=MAX_METADATA_BYTES)
    if len(found) > MAX_METADATA:
        raise FieldError(f"has more than {MAX_METADATA} entries", "metadata")
    return found
