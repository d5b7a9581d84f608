"""What texts are in tokens: only what was asked for, and not where everybody else waits."""

from __future__ import annotations

import threading

import pytest

from tests.api.house import House

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("body", [{"prompt": "hi", "add_special_tokens": False}, {"prompt": "hi"}])
async def test_tokens_are_spelled_if_asked_for_and_elsewhere(
    house: House, monkeypatch: pytest.MonkeyPatch, body: dict[str, object]
) -> None:
    threads: list[threading.Thread] = []
    spell = house.engine.tokenizer.token_bytes

    def watched(token: int) -> bytes:
        threads.append(threading.current_thread())
        return spell(token)

    monkeypatch.setattr(house.engine.tokenizer, "token_bytes", watched)
    assert (await house.http.post("/tokenize", json=body)).json()["token_strs"] is None
    assert threads == []
    told = (await house.http.post("/tokenize", json=body | {"return_token_strs": True})).json()
    assert told["token_strs"] == ["h", "i"]
    assert len(threads) == 2
    assert threading.current_thread() not in threads
