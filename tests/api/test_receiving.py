"""Uploads on their way in: streamed, bounded, and gone if anything goes wrong."""

from __future__ import annotations

import asyncio
import hashlib
import tracemalloc
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.requests import ClientDisconnect, Request

from server.api.forms import PartKind, PartRule, read_form
from store.errors import InvalidRequestError, SwitchyardError, TooLargeError
from store.validation import Limits, Validator
from tests.api.dummy_engine import MANIFEST
from tests.api.house import error, make_expert, open_house

pytestmark = pytest.mark.anyio

RULES = {
    "file": PartRule(PartKind.FILE, 1 << 22),
    "note": PartRule(PartKind.SMALL, 100),
    "name": PartRule(PartKind.TEXT, 100),
}


def part(name: str, data: bytes, filename: str | None = None) -> bytes:
    file = f'; filename="{filename}"' if filename is not None else ""
    return f'--b\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'.encode() + data + b"\r\n"


def request(pieces: Iterator[bytes], *, cut_off: bool = False) -> Request:
    """A request whose body comes in these pieces, from a client that may go away at the end of them."""

    async def receive() -> dict[str, object]:
        await asyncio.sleep(0)
        for piece in pieces:
            return {"type": "http.request", "body": piece, "more_body": True}
        return {"type": "http.disconnect"} if cut_off else {"type": "http.request", "body": b"", "more_body": False}

    headers = [(b"content-type", b"multipart/form-data; boundary=b")]
    return Request({"type": "http", "method": "POST", "path": "/", "headers": headers}, receive)  # type: ignore[arg-type]


@settings(deadline=None)
@given(data=st.binary(max_size=300), sizes=st.lists(st.integers(1, 40), min_size=1), note=st.binary(max_size=50))
async def test_any_bytes_in_any_pieces(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, sizes: list[int], note: bytes
) -> None:
    if b"--b" in data + note:
        return
    folder = tmp_path_factory.getbasetemp()
    body = part("name", b"x") + part("file", data, "f") + part("note", note, "n") + b"--b--\r\n"
    pieces = []
    while body:
        size = sizes[len(pieces) % len(sizes)]
        pieces.append(body[:size])
        body = body[size:]
    async with read_form(request(iter(pieces)), RULES, folder) as form:
        file = form.files["file"]
        assert (form.text("name"), form.values["note"]) == ("x", note)
        assert (file.bytes, file.digest) == (len(data), hashlib.sha256(data).hexdigest())
        assert file.path.read_bytes() == data
    assert not file.path.exists()


@pytest.mark.parametrize(
    ("body", "kind", "param"),
    [
        (b"junk", InvalidRequestError, None),
        (b"", InvalidRequestError, None),
        (part("file", b"x", "f"), InvalidRequestError, None),
        (part("file", b"x", "f") + b"--b\r\n", InvalidRequestError, None),
        (b"--b\r\nContent-Disposition: form-data\r\n\r\nx\r\n--b--\r\n", InvalidRequestError, None),
        (b"--b\r\nX: " + b"y" * 10_000, InvalidRequestError, None),
        (part("file", b"x" * (1 << 22) + b"y", "f") + b"--b--", TooLargeError, "file"),
        (part("note", b"x" * 101) + b"--b--", TooLargeError, "note"),
        (part("file", b"x", "f") + part("file", b"y", "f") + b"--b--", InvalidRequestError, "file"),
        (part("file", b"x", "f") + part("other", b"y") + b"--b--", InvalidRequestError, "other"),
        (part("file", b"x", "f") + part("name", b"y", "n") + b"--b--", InvalidRequestError, "name"),
    ],
)
async def test_bodies_that_cannot_be(
    tmp_path: Path, body: bytes, kind: type[SwitchyardError], param: str | None
) -> None:
    with pytest.raises(kind) as refused:
        async with read_form(request(iter([body])), RULES, tmp_path):
            pass
    assert refused.value.param == param
    assert list(tmp_path.iterdir()) == []


async def test_a_client_that_goes_away_leaves_nothing(tmp_path: Path) -> None:
    begun = part("file", b"x" * (3 << 20), "f")[:-2]
    with pytest.raises(ClientDisconnect):
        async with read_form(request(iter([begun]), cut_off=True), RULES, tmp_path):
            pass
    assert list(tmp_path.iterdir()) == []


async def test_a_cancelled_request_leaves_nothing(tmp_path: Path) -> None:
    def endless() -> Iterator[bytes]:
        yield part("file", b"x" * (2 << 20), "f")[:-2]
        while True:
            yield b""

    async def receive_it() -> None:
        async with read_form(request(endless()), RULES, tmp_path):
            pass

    receiving = asyncio.create_task(receive_it())
    while not any(path.stat().st_size for path in tmp_path.iterdir()):
        await asyncio.sleep(0.001)
    receiving.cancel()
    await asyncio.gather(receiving, return_exceptions=True)
    assert list(tmp_path.iterdir()) == []


async def test_a_large_file_takes_no_memory(tmp_path: Path) -> None:
    size = 64 << 20
    rules = {"file": PartRule(PartKind.FILE, size)}

    def pieces() -> Iterator[bytes]:
        yield part("file", b"", "f")[:-2]
        for _ in range(size >> 16):
            yield b"x" * (1 << 16)
        yield b"\r\n--b--"

    tracemalloc.start()
    try:
        async with read_form(request(pieces()), rules, tmp_path) as form:
            assert form.files["file"].bytes == size
            assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


@pytest.fixture(scope="module")
async def validator() -> AsyncIterator[Validator]:
    validator = Validator(MANIFEST, Limits(1, 60, 1 << 30), module="tests.store.evil_checker")
    yield validator
    validator.close()


async def test_a_hostile_file_is_a_400_and_the_server_goes_on(tmp_path: Path, validator: Validator) -> None:
    async with open_house(tmp_path, check=validator.check) as house:
        for word, said in (("crash", "crash"), ("burn ", "processor time"), ("alloc", "memory")):
            answers = await asyncio.gather(
                house.http.post("/v1/experts", files={"file": ("e", word.encode())}), house.chat("hello")
            )
            detail = error(answers[0], 400)
            assert (detail["code"], detail["param"]) == ("check_failed", "file")
            assert said in detail["message"]
            assert answers[1].status_code == 200
        assert house.quarantined == []
        assert (await house.upload(make_expert(tmp_path / "e", name="cron"))).status_code == 201
        assert error(await house.upload(make_expert(tmp_path / "e", value=2, name="cron")), 409)


async def test_the_limit_is_the_setting_s(tmp_path: Path) -> None:
    async with open_house(tmp_path, max_upload_bytes=1000) as house:
        answer = await house.http.post("/v1/experts", files={"file": ("e", b"x" * 2000)})
        assert error(answer, 413)["code"] == "payload_too_large"
        assert house.quarantined == []
