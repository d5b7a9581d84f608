"""Compact expert files: a long header is deflated, and the payloads follow each other in one tensor."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from store.codecs.base import ternary
from store.errors import ExpertFileError, InvalidRequestError
from store.expert_file import MAX_HEADER_BYTES, read_deltas, read_header, tensor_bytes, validate, write_expert
from store.expert_header import header_to_json
from store.expert_info import ExpertInfo
from store.expert_layout import PLAIN_BYTES, header_room
from store.manifest import BaseManifest
from tests.store.builders import (
    base_manifest,
    compact_file,
    document_of,
    join_file,
    packed_expert,
    packed_newer,
    split_file,
    with_document,
    write_sample,
)

LONG = {"exemplars": tuple(f"exemplar number {row} of quite a few" for row in range(150))}


@pytest.fixture
def everything_compact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("store.expert_layout.PLAIN_BYTES", 0)


def parts(path: Path) -> tuple[bytes, bytes]:
    """(deflated header, payloads)."""
    table, data = split_file(path.read_bytes())
    stop = table["header"]["shape"][0]  # type: ignore[index]
    return data[:stop], data[stop:]


def test_a_long_header_is_deflated_and_a_short_one_is_not(tmp_path: Path) -> None:
    short, long = write_sample(tmp_path / "short"), write_sample(tmp_path / "long", **LONG)
    assert "compact" not in read_header(short).required_features
    header = validate(long, base_manifest())
    assert "compact" in header.required_features
    assert header.exemplars == LONG["exemplars"]
    payloads = sum(tensor_bytes(long).values())
    assert 4 * (long.stat().st_size - payloads) < len(header_to_json(header))
    with safe_open(long, framework="np") as file:
        assert set(file.keys()) == {"header", "data"}
        assert json.loads(file.metadata()["switchyard"]) == {"format": 1, "required_features": ["compact"]}
        assert file.get_tensor("data").nbytes == payloads


@pytest.mark.usefixtures("everything_compact")
@pytest.mark.parametrize("packed", [packed_expert, packed_newer])
def test_a_compact_file_says_what_a_plain_one_says(
    tmp_path: Path, packed: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    compact = write_sample(tmp_path / "compact", tensors=packed(), name="same")
    assert compact.read_bytes() == write_sample(tmp_path / "again", tensors=packed(), name="same").read_bytes()
    monkeypatch.setattr("store.expert_layout.PLAIN_BYTES", PLAIN_BYTES)
    plain = write_sample(tmp_path / "plain", tensors=packed(), name="same")
    ours, theirs = vars(validate(compact, base_manifest())), vars(validate(plain, base_manifest()))
    assert set(ours.pop("required_features")) == {*theirs.pop("required_features"), "compact"}
    assert ours == theirs
    assert tensor_bytes(compact) == tensor_bytes(plain)
    deltas = dict(read_deltas(compact.read_bytes(), base_manifest()))
    for name, expected in read_deltas(plain, base_manifest()):
        for key, value in vars(expected).items():
            np.testing.assert_array_equal(vars(deltas[name])[key], value)


@pytest.mark.usefixtures("everything_compact")
def test_a_reader_from_before_says_that_the_file_is_newer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_sample(tmp_path / "e")
    monkeypatch.setattr("store.expert_header.KNOWN_FEATURES", frozenset({"levels"}))
    with pytest.raises(ExpertFileError, match="asks for compact: this file needs a newer Switchyard"):
        read_header(path)


def test_an_empty_expert_is_a_file_too(tmp_path: Path) -> None:
    base = BaseManifest("a" * 64, {})
    write_expert(tmp_path / "e", ExpertInfo(codec="raw", tool="tests", **LONG), {}, base)  # type: ignore[arg-type]
    assert validate(tmp_path / "e", base).tensors == {}


def deflated(text: bytes) -> bytes:
    return zlib.compress(text, 9)


@pytest.mark.usefixtures("everything_compact")
@pytest.mark.parametrize(
    ("change", "param", "fault"),
    [
        (lambda head, data: (b"\0" * len(head), data), "header", "no zlib stream"),
        (lambda head, data: (head[:-1], data), "header", "one zlib stream"),
        (lambda head, data: (head + b"\0", data), "header", "one zlib stream"),
        (lambda head, data: (head[:-1] + bytes([head[-1] ^ 1]), data), "header", "no zlib stream"),
        (lambda head, data: (deflated(b" " * (MAX_HEADER_BYTES + 1)), data), "header", "one zlib stream"),
        (lambda head, data: (deflated(b"0" * (1 << 26)), data), "header", "one zlib stream"),
        (lambda head, data: (deflated(b"{}"), data), "format", "missing"),
        (lambda head, data: (deflated(b"[]"), data), "switchyard", "JSON object"),
        (lambda head, data: (deflated(b'{"a": 1, "a": 2}'), data), "switchyard", "twice"),
        (lambda head, data: (b"", data), "header", "one zlib stream"),
        (lambda head, data: (head, data + b"\0"), "bytes", "one size per tensor"),
        (lambda head, data: (head, data[:-1]), "bytes", "integers from 0|one size per tensor"),
    ],
)
def test_faults_of_the_stream(
    tmp_path: Path, change: Callable[[bytes, bytes], tuple[bytes, bytes]], param: str, fault: str
) -> None:
    path = write_sample(tmp_path / "e")
    path.write_bytes(compact_file(*change(*parts(path))))
    with pytest.raises(ExpertFileError, match=fault) as caught:
        validate(path, base_manifest())
    assert caught.value.param == param


@pytest.mark.usefixtures("everything_compact")
@pytest.mark.parametrize(
    ("sizes", "fault"),
    [
        (lambda sizes: None, "missing"),
        (lambda sizes: sizes[:-1], "one size per tensor"),
        (lambda sizes: [*sizes, 0], "more than"),
        (lambda sizes: [*sizes[:-1], sizes[-1] + 1], "one size per tensor"),
        (lambda sizes: [-1, sizes[0] + sizes[1] + 1, *sizes[2:]], "integers"),
        (lambda sizes: [float(size) for size in sizes], "integers"),
        (lambda sizes: [True, *sizes[1:]], "integers"),
        (lambda sizes: [10**400, *sizes[1:]], "integers"),
        (lambda sizes: [sizes[0] - 2, sizes[1] + 2, *sizes[2:]], "asks for another number"),
        (lambda sizes: [sizes[0], sizes[1] + sizes[2] - 1, 1, *sizes[3:]], "payload|bits|bytes|hold"),
    ],
)
def test_faults_of_the_sizes(tmp_path: Path, sizes: Callable[[list[int]], object], fault: str) -> None:
    path = write_sample(tmp_path / "e")
    document = document_of(path.read_bytes())
    changed = document | {"bytes": sizes(document["bytes"])}
    path.write_bytes(with_document(path.read_bytes(), changed))
    with pytest.raises(ExpertFileError, match=fault):
        validate(path, base_manifest())


@pytest.mark.usefixtures("everything_compact")
def test_faults_of_the_container(tmp_path: Path) -> None:
    path = write_sample(tmp_path / "e")
    good = path.read_bytes()
    table, data = split_file(good)
    header, payloads = table["header"], table["data"]
    last = len(data)
    cases = [
        {**table, "extra": {"dtype": "U8", "shape": [0], "data_offsets": [last, last]}},
        {"__metadata__": table["__metadata__"], "data": header, "header": payloads},
        {"__metadata__": table["__metadata__"], "header": {**header, "shape": [1, *header["shape"]]}, "data": payloads},  # type: ignore[dict-item, index]
        {"__metadata__": table["__metadata__"], "header": {**header, "dtype": "I8"}, "data": payloads},  # type: ignore[dict-item]
    ]
    for case in cases:
        path.write_bytes(join_file(case, data))
        with pytest.raises(ExpertFileError, match=r"in that order|must be U8"):
            read_header(path)
    document = document_of(good)
    path.write_bytes(with_document(good, document | {"required_features": []}))
    with pytest.raises(ExpertFileError, match="lacks compact"):
        read_header(path)


def test_a_header_too_long_for_any_reader_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="give fewer exemplars"):
        write_sample(tmp_path / "e", exemplars=tuple(f"{row}" * 2000 for row in range(400)))
    assert not (tmp_path / "e").exists()


@settings(max_examples=20, deadline=None)
@given(tensors=st.integers(1, 300), exemplars=st.integers(0, 100), seed=st.integers(0, 1000))
def test_the_room_for_the_header_is_enough_and_not_much_more(
    tmp_path_factory: pytest.TempPathFactory, tensors: int, exemplars: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    shapes = {f"model.layers.{row}.mlp.weight": (int(rng.integers(8, 40)), 64) for row in range(tensors)}
    base = BaseManifest("a" * 64, dict(shapes))
    packed = {}
    for name, shape in shapes.items():
        indices = np.flatnonzero(rng.random(math.prod(shape)) < 0.02)
        if len(indices):
            packed[name] = ternary(name, shape, indices, rng.random(len(indices)) < 0.5, float(rng.uniform(0.001, 0.1)))
    told = {"exemplars": tuple(f"exemplar {number}" for number in rng.integers(0, 1 << 40, exemplars))}
    info = ExpertInfo(codec="flex-switch", tool="tests", **told)  # type: ignore[arg-type]
    path = tmp_path_factory.mktemp("room") / "e"
    write_expert(path, info, packed, base)
    room = header_room(info, base.tensors)
    spent = path.stat().st_size - sum(item.nbytes for item in packed.values())
    assert spent <= room <= 1.4 * spent + 2048
