"""docs/expert-file.md must not drift from the code."""

from __future__ import annotations

from store import card, encodings, expert_file, expert_info, expert_layout, tensor_file
from tests.store.example import DOCUMENT, MARKED, example


def test_the_worked_example_is_up_to_date() -> None:
    found = MARKED.search(DOCUMENT.read_text(encoding="utf-8"))
    assert found is not None
    assert found.group() == example(), "run python -m tests.store.example"


def test_the_limits_in_the_document_are_those_of_the_code() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    for limit in (
        expert_file.MAX_HEADER_BYTES,
        expert_layout.PLAIN_BYTES,
        expert_info.MAX_EXEMPLARS,
        expert_info.MAX_EXEMPLAR_BYTES,
        expert_info.MAX_DESCRIPTION_BYTES,
        expert_info.MAX_TOOL_BYTES,
        card.MAX_AUTHOR_BYTES,
        card.MAX_LICENSE_BYTES,
        card.MAX_TAGS,
        card.MAX_PARENTS,
        card.MAX_METADATA,
        card.MAX_METADATA_BYTES,
        tensor_file.MAX_RANK,
        tensor_file.MAX_NAME_BYTES,
    ):
        assert f" {limit:,} " in text
    assert f"{encodings.MIN_K} ≤ k ≤ {encodings.MAX_K}" in text
    for pattern in (expert_info.NAME_PATTERN, card.TAG_PATTERN, card.KEY_PATTERN):
        assert f"`{pattern.pattern}`" in text
