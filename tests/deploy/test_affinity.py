"""Which replica a request goes to, and how it gets there: without Ray."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.types import Receive, Scope, Send

from deploy.affinity import CONTROL, Holdings, Need, needs, ranked
from deploy.asgi_call import Head, Start, call

CHAT = "/v1/chat/completions"


@pytest.mark.parametrize(
    ("method", "path", "body", "expected"),
    [
        ("POST", CHAT, {"model": "law"}, Need("law")),
        ("POST", "/v1/completions", {"model": "law", "prompt": "x"}, Need("law")),
        ("POST", CHAT, {"model": "tiny"}, Need()),
        ("POST", CHAT, {"model": "auto", "experts": [{"id": "a", "weight": 0.3}, {"id": "b", "weight": -1}]},
         Need("b")),
        ("POST", CHAT, {"model": "auto", "experts": [{"id": "a"}, 7, {"weight": 2}, {"id": 3}]}, Need("a")),
        ("POST", CHAT, {"model": "auto", "experts": "abc"}, Need()),
        ("POST", CHAT, {"model": 7}, Need()),
        ("POST", CHAT, [], Need()),
        ("POST", CHAT, b"{", Need()),
        ("POST", CHAT, b"\xff", Need()),
        ("POST", "/v1/completions", {"model": "auto", "prompt": "who?" * 999}, Need(text=("who?" * 999)[:2000])),
        ("POST", "/v1/completions", {"model": "auto", "prompt": [1, 2]}, Need()),
        ("POST", CHAT, {"model": "auto", "messages": [
            {"role": "user", "content": "first"}, {"role": "user", "content": "last"}, {"role": "assistant"}, 3,
        ]}, Need(text="last")),
        ("GET", "/v1/models", b"", Need()),
        ("GET", "/v1/experts/law", b"", Need()),
        ("GET", "/metrics", b"", Need()),
        ("POST", "/v1/route", {"prompt": "x"}, Need()),
        ("POST", "/v1/experts", b"--form", Need(CONTROL)),
        ("PUT", "/v1/experts/law", b"--form", Need(CONTROL)),
        ("DELETE", "/v1/experts/law", b"", Need(CONTROL)),
        ("PUT", "/v1/aliases/law", {}, Need(CONTROL)),
        ("POST", "/v1/admin/keys", {}, Need(CONTROL)),
        ("HEAD", "/v1/uploads/1", b"", Need(CONTROL)),
        ("GET", "/v1/jobs/1", b"", Need(CONTROL)),
        ("GET", "/v1/jobsandmore", b"", Need()),
    ],
)  # fmt: skip
def test_what_a_request_needs_most(method: str, path: str, body: object, expected: Need) -> None:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    assert needs(method, path, data, base="tiny") == expected


def strange(value: object) -> bytes:
    return json.dumps({"model": "auto", "experts": value, "messages": value, "prompt": value}).encode()


@given(st.binary(max_size=200) | st.recursive(st.none() | st.text() | st.integers(), st.lists).map(strange))
def test_no_body_is_too_strange(body: bytes) -> None:
    need = needs("POST", CHAT, body, base="tiny")
    assert isinstance(need.expert, str)
    assert isinstance(need.text, str)


def test_who_holds_it_comes_first() -> None:
    holdings = {
        "r1": Holdings(),
        "r2": Holdings(host=frozenset({"law"})),
        "r3": Holdings(device=frozenset({"law"})),
        "r4": Holdings.of({"device": ["law"], "host": ["law"]}),
        "r5": Holdings.of({}),
    }
    first, second, *rest = ranked("law", holdings)
    assert (first, second) == (["r3", "r4"], ["r2"])
    assert sorted(chain(*rest)) == ["r1", "r5"]


def test_a_cold_expert_has_one_favourite_and_the_favourites_are_spread() -> None:
    replicas = {f"r{i}": Holdings() for i in range(4)}
    favourites = {f"expert-{i}": ranked(f"expert-{i}", replicas)[0] for i in range(400)}
    assert all(len(group) == 1 for group in favourites.values())
    counts = Counter(group[0] for group in favourites.values())
    assert min(counts.values()) > 60
    fewer = {key: value for key, value in replicas.items() if key != "r2"}
    for name, group in favourites.items():
        if group != ["r2"]:
            assert ranked(name, fewer)[0] == group, "a replica that goes moves only its own"


def test_every_replica_is_tried_and_none_twice() -> None:
    replicas = {f"r{i}": Holdings(device=frozenset({"a"} if i % 2 else {"b"})) for i in range(5)}
    for name in ("a", "b", "c", CONTROL):
        assert sorted(chain(*ranked(name, replicas))) == sorted(replicas)
    assert ranked("a", {}) == []


def test_an_answer_comes_piece_by_piece() -> None:
    seen: list[object] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append((scope["method"], scope["path"], (await receive())["body"]))
        await send({"type": "http.response.start", "status": 207, "headers": [(b"a", b"b")]})
        for piece in (b"one", b"", b"two"):
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def body() -> None:
        pieces = [piece async for piece in call(app, Head("PUT", "/x", b"", []), b"data")]
        assert pieces == [Start(207, [(b"a", b"b")]), b"one", b"two"]
        assert seen == [("PUT", "/x", b"data")]

    asyncio.run(body())


def test_a_client_that_goes_away_is_noticed() -> None:
    told: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"first", "more_body": True})
        told.append((await receive())["type"])

    async def body() -> None:
        pieces = call(app, Head("GET", "/", b"", []), b"")
        assert [await anext(pieces), await anext(pieces)][1] == b"first"
        await pieces.aclose()  # type: ignore[attr-defined]
        assert told == ["http.disconnect"]

    asyncio.run(body())


def test_a_failure_is_raised_where_the_answer_breaks() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise ValueError("broken")

    async def body() -> None:
        pieces = call(app, Head("GET", "/", b"", []), b"")
        assert isinstance(await anext(pieces), Start)
        with pytest.raises(ValueError, match="broken"):
            await anext(pieces)

    asyncio.run(body())
