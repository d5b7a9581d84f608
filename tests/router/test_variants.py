"""Exemplars in other forms."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from router.background import background_texts
from router.variants import FRAMES, variants, without_instruction

WORDS = st.lists(st.sampled_from("abc"), max_size=6).map(" ".join)


def test_the_shared_instruction_goes() -> None:
    prompts = [f"Is this review positive or negative? The {thing} was {how} indeed" for thing, how in
               (("soup", "cold"), ("film", "long"), ("phone", "loud"), ("chair", "soft"), ("boat", "old"))]  # fmt: skip
    assert without_instruction(prompts)[0] == "soup was cold"


def test_an_expert_may_have_several_templates() -> None:
    prompts = [f"Translate to French: word{i} other{i}" for i in range(5)]
    prompts += [f"How does one say word{i} other{i} in French?" for i in range(5)]
    assert set(without_instruction(prompts)) == {f"word{i} other{i}" for i in range(5)}


def test_a_template_forgives_a_few_that_do_not_fit() -> None:
    prompts = [f"Write a poem about red{i} things{i}" for i in range(19)] + ["Write anything at all"]
    found = without_instruction(prompts)
    assert found[0] == "red0 things0"
    assert found[-1] == "anything at all"


def test_a_bare_number_keeps_what_follows_it() -> None:
    prompts = [f"Write the number {i} in French words." for i in range(100, 110)]
    assert without_instruction(prompts)[0] == "100 in French words."
    assert without_instruction([f"Square {i}" for i in range(10)]) == [f"Square {i}" for i in range(10)]


def test_few_that_begin_alike_are_no_template() -> None:
    prompts = ["What is red paint?", "What is blue paint?", "Who goes there?"]
    assert without_instruction(prompts) == prompts


@given(st.lists(WORDS, max_size=12), st.integers(0, 3))
def test_variants_begin_with_the_exemplars_and_repeat_nothing(exemplars: list[str], frames: int) -> None:
    found = variants(exemplars, frames=frames)
    plain = list(dict.fromkeys(exemplars))
    assert list(found)[: len(plain)] == plain
    assert all(found[text] == text for text in plain)
    assert set(found.values()) == set(plain)
    assert len(found) <= len(plain) * (2 + frames)
    assert set(found) == set(variants(exemplars[::-1], frames=frames))


def test_frames_keep_the_text() -> None:
    found = variants(["a single exemplar"], frames=2)
    (plain, *framed) = found
    assert set(found.values()) == {plain}
    assert plain == "a single exemplar"
    assert len(framed) == 2
    assert all("a single exemplar" in text for text in framed)
    assert all(frame.count("{}") == 1 for frame in FRAMES)


def test_the_background_is_there() -> None:
    texts = background_texts()
    assert len(texts) > 400
    assert all(text.strip() for text in texts)
    assert len(set(texts)) == len(texts)


def test_a_long_beginning_is_read_once() -> None:
    """Not again for each of its words: whoever uploads exemplars chooses how long it is."""
    texts = [f"{'word ' * 100_000}{letter} is the question" for letter in "abcdef"]
    assert without_instruction(texts) == [f"{letter} is the question" for letter in "abcdef"]
