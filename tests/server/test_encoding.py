"""Long prompts hold up nobody."""

from __future__ import annotations

import asyncio
import threading

import pytest

from server.encoding import Encoder
from server.engine.types import Tokenizer
from server.prompts import TextPrompt, TokenPrompt
from store.errors import ContextLengthError
from tests.api.dummy_engine import CONTEXT, DummyEngine, DummyTokenizer

pytestmark = pytest.mark.anyio


async def test_what_cannot_fit_is_not_tokenised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DummyTokenizer, "encode", lambda *_: pytest.fail("tokenised"))
    with pytest.raises(ContextLengthError, match="maximum context length") as raised:
        await Encoder(DummyEngine()).encode(TextPrompt("x" * (64 * CONTEXT + 1), "input"))
    assert raised.value.param == "input"


async def test_long_prompts_wait_for_each_other_and_nobody_else_does() -> None:
    """However many of them there are, short ones are encoded at once, and other work finds a thread."""
    encoder, done = Encoder(DummyEngine()), threading.Event()

    def endless(_: Tokenizer) -> None:
        assert done.wait(60)

    waiting = [asyncio.create_task(encoder.apart(endless)) for _ in range(100)]
    try:
        await asyncio.sleep(0.05)
        assert await encoder.encode(TextPrompt("hi")) == list(b"hi")
        assert await asyncio.wait_for(asyncio.to_thread(lambda: 1), 30) == 1
    finally:
        done.set()
        await asyncio.gather(*waiting)


def test_routing_looks_at_the_beginning_of_token_ids() -> None:
    """Of a million of them, too, which nobody would wait for."""
    (text,) = TokenPrompt(tuple(b"ab" * 1_000_000)).questions(DummyTokenizer())
    assert text == "ab" * 512
