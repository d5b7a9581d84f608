"""Tokens → bytes, for each way in which vocabularies are written."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

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


def test_long_texts_hold_up_no_other_thread(tmp_path: Path) -> None:
    """Several threads encode at once, each what transformers alone makes of its text."""
    tokenizer().save_pretrained(tmp_path)
    made, plain = ModelTokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    texts = [f"text {i} " * (1 + 50 * i) for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(made.encode, texts * 8))
    assert found == [plain.encode(text) for text in texts] * 8
    assert made._backend is not None
