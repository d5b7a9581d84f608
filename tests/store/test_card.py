"""What is said about an expert: bounded, strict, and absent from files that say nothing."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from store import card as limits
from store.card import Card, card_from_json, card_to_json, check_card
from store.errors import ExpertFileError, InvalidRequestError
from store.expert_file import read_header, validate
from store.strict_json import FieldError, Fields
from tests.store.builders import base_manifest, document_of, with_document, write_sample

FULL = Card(
    author="Ada Lovelace <ada@example.org>",
    license="Apache-2.0 OR MIT",
    tags=("language:fr", "numbers", "a/b"),
    parents=("a" * 64, "b" * 64),
    metadata={"eval.loss": "0.31", "Note": "zwei\nZeilen 🙂"},
)


def test_a_card_travels_in_the_file(tmp_path: Path) -> None:
    path = write_sample(tmp_path / "e", card=FULL)
    assert validate(path, base_manifest()).card == FULL
    header = document_of(path.read_bytes())
    assert list(header)[-6:] == ["author", "license", "tags", "parents", "metadata", "tensors"]
    assert list(header["metadata"]) == ["Note", "eval.loss"], "canonical order"


def test_a_file_that_says_nothing_has_the_bytes_it_always_had(tmp_path: Path) -> None:
    """The digest of this sample before cards were part of the format."""
    path = write_sample(tmp_path / "e")
    assert hashlib.sha256(path.read_bytes()).hexdigest() == (
        "a0051749c1f8a3a65fd382f9fa517cddbd9f288a8dd83c787bf6fb52c8f1508f"
    )
    assert read_header(path).card == Card()


words = st.lists(st.from_regex(limits.TAG_PATTERN, fullmatch=True), max_size=limits.MAX_TAGS, unique=True)
lines = st.text(st.characters(exclude_categories=("Cc", "Cs")), max_size=40)
cards = st.builds(
    Card,
    author=lines,
    license=lines.filter(lambda text: len(text.encode()) <= limits.MAX_LICENSE_BYTES),
    tags=words.map(tuple),
    parents=st.lists(st.binary(min_size=32, max_size=32).map(bytes.hex), max_size=4, unique=True).map(tuple),
    metadata=st.dictionaries(
        st.from_regex(limits.KEY_PATTERN, fullmatch=True),
        st.text(st.characters(exclude_categories=("Cs",)), max_size=200),
        max_size=limits.MAX_METADATA,
    ),
)


@given(cards)
def test_any_card_survives(card: Card) -> None:
    text = json.dumps(card_to_json(card))
    assert card_from_json(Fields(json.loads(text), "card")) == card


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from(["author", "license", "tags", "parents", "metadata"]), json_values))
def test_whatever_is_sent_is_a_card_or_a_fault(document: dict[str, object]) -> None:
    with suppress(FieldError):
        check_card(card_from_json(Fields(document, "card")))


@pytest.mark.parametrize(
    ("changes", "param", "fault"),
    [
        ({"author": 1}, "author", "must be a string"),
        ({"author": "x" * 201}, "author", "longer than 200"),
        ({"author": "two\nlines"}, "author", "one line"),
        ({"license": "x" * 101}, "license", "longer than 100"),
        ({"license": "\x1b[31m"}, "license", "one line"),
        ({"tags": "a"}, "tags", "must be a list"),
        ({"tags": ["Upper"]}, "tags", "match"),
        ({"tags": ["a", "a"]}, "tags", "twice"),
        ({"tags": [f"t{i}" for i in range(33)]}, "tags", "more than 32"),
        ({"parents": ["abc"]}, "parents", "match"),
        ({"parents": ["A" * 64]}, "parents", "match"),
        ({"metadata": []}, "metadata", "object"),
        ({"metadata": {"a b": "c"}}, "metadata", "key"),
        ({"metadata": {"k": 1}}, "metadata.k", "must be a string"),
        ({"metadata": {"k": "x" * 1001}}, "metadata.k", "longer than 1000"),
        ({"metadata": {f"k{i}": "" for i in range(33)}}, "metadata", "more than 32"),
    ],
)
def test_what_a_card_must_not_say(tmp_path: Path, changes: dict[str, object], param: str, fault: str) -> None:
    path = write_sample(tmp_path / "e")
    data = path.read_bytes()
    path.write_bytes(with_document(data, document_of(data) | changes))
    with pytest.raises(ExpertFileError, match=fault) as caught:
        read_header(path)
    assert caught.value.param == param


def test_nothing_is_written_that_could_not_be_read(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        write_sample(tmp_path / "e", card=Card(tags=("Upper",)))
    assert caught.value.param == "tags"
    assert not (tmp_path / "e").exists()
