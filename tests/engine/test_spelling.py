"""Tokens → bytes, for each way in which vocabularies are written."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from server.engine.spelling import Spelling
from server.engine.tokenizer import ModelTokenizer
from tests.tiny import tokenizer


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=20))
def test_byte_level_tokens_spell_the_text(text: str) -> None:
    fast = tokenizer()
    spelling = Spelling(fast)
    assert b"".join(map(spelling.bytes_of, fast.encode(text, add_special_tokens=False))) == text.encode()


def test_special_and_unknown_tokens() -> None:
    spelling = Spelling(tokenizer())
    assert spelling.bytes_of(256) == b"<|end|>"
    assert spelling.bytes_of(10_000) == b""


@pytest.mark.parametrize(
    ("token", "spelled"), [("▁the", b" the"), ("<0xE2>", b"\xe2"), ("Ġ", "Ġ".encode()), ("é", "é".encode())]
)
def test_sentencepiece_tokens(token: str, spelled: bytes) -> None:
    core = Tokenizer(models.BPE(vocab={token: 0}, merges=[], byte_fallback=True))
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    assert Spelling(PreTrainedTokenizerFast(tokenizer_object=core)).bytes_of(0) == spelled


def test_the_model_s_tokenizer_spells(tmp_path: Path) -> None:
    tokenizer().save_pretrained(tmp_path)
    made = ModelTokenizer(tmp_path)
    assert [made.token_bytes(token) for token in made.encode("hé")] == [b"h", b"\xc3", b"\xa9"]
