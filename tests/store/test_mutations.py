"""2,800 damaged or hostile expert files: each is refused by name, or decodes to a sound expert; nothing else."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from store.deltas import DenseDelta
from store.errors import ExpertFileError
from store.expert_file import read_deltas, validate
from tests.store.builders import (
    SHAPES,
    base_manifest,
    document_of,
    join_file,
    packed_newer,
    split_file,
    with_document,
    write_sample,
)

COUNT = 2800
HOSTILE: list[Any] = [
    None, True, False, 0, 1, -1, 2**31, 2**38, 2**53, 2**63, 2**64, 10**400, 0.5, -0.0, 1e-320, 1e308, float("nan"),
    float("inf"), "", "x", "\ud800", "a" * 10_000, "../..", [], [[]], [0], [2**40], [2**20] * 8, {}, {"a": {}},
    "F32", "BF16", "bitmap", "rice", "rice-zeros", "grouped", "dense", "ternary", "levels", "low-rank",
]  # fmt: skip


def flip_bits(rng: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 8])):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def flip_payload(rng: random.Random, data: bytes) -> bytes:
    start = 8 + struct.unpack("<Q", data[:8])[0]
    return data[:start] + flip_bits(rng, data[start:])


def change_length(rng: random.Random, data: bytes) -> bytes:
    length = struct.unpack("<Q", data[:8])[0]
    other = rng.choice([0, 1, length - 1, length + 1, length + 8, len(data), 2**20, 2**20 + 1, 2**63, 2**64 - 1])
    return struct.pack("<Q", other) + data[8:]


def cut(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.randrange(len(data))]


def extend(rng: random.Random, data: bytes) -> bytes:
    return data + rng.randbytes(rng.randrange(1, 50))


def splice(rng: random.Random, data: bytes) -> bytes:
    first, second = sorted(rng.randrange(len(data)) for _ in range(2))
    return data[:first] + data[second:] + data[first:second]


def paths_in(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a JSON document."""
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [entry for key in keys for entry in [(value, key), *paths_in(value[key])]]


def change_json(document: Any, rng: random.Random) -> None:
    container, key = rng.choice(paths_in(document))
    action = rng.randrange(4)
    if action == 0:
        del container[key]
    elif action == 1:
        other, other_key = rng.choice(paths_in(document))
        container[key], other[other_key] = other[other_key], container[key]
    elif action == 2 and type(container[key]) in (int, float):
        container[key] = container[key] * rng.choice([-1, 2, 8, 0.5, 10**9]) + rng.choice([-1, 0, 1])
    else:
        container[key] = rng.choice(HOSTILE)


def change_table(rng: random.Random, data: bytes) -> bytes:
    table, payload = split_file(data)
    change_json(table, rng)
    return join_file(table, payload)


def change_header(rng: random.Random, data: bytes) -> bytes:
    document = document_of(data)
    change_json(document, rng)
    return with_document(data, document)


def change_tensor(rng: random.Random, data: bytes) -> bytes:
    """Like `change_header`, aimed at one tensor, with the density kept consistent so that the fault gets deeper."""
    document = document_of(data)
    entry = document["tensors"][rng.choice(sorted(document["tensors"]))]
    key = rng.choice(sorted(entry))
    entry[key] = rng.choice([*HOSTILE, *range(1, 26), [16, 37], [37, 16], [592], [1, 592]])
    try:
        sparse = [item for item in document["tensors"].values() if item["kind"] in ("ternary", "levels")]
        document["density"] = sum(item["nnz"] for item in sparse) / sum(item["numel"] for item in sparse)
    except (TypeError, KeyError, ZeroDivisionError, OverflowError):
        pass
    return with_document(data, document)


def swap_names(rng: random.Random, data: bytes) -> bytes:
    first, second = rng.sample(sorted(SHAPES), 2)
    return data.replace(first.encode(), second.encode(), rng.choice([1, 2, 3]))


MUTATIONS: list[Callable[[random.Random, bytes], bytes]] = [
    flip_bits, flip_payload, flip_payload, change_length, cut, extend, splice, change_table, change_table,
    change_header, change_header, change_tensor, change_tensor, swap_names,
]  # fmt: skip


def assert_sound(path: Path) -> None:
    """What the engine may rely on."""
    for name, delta in read_deltas(path, base_manifest()):
        assert delta.shape == SHAPES[name]
        if isinstance(delta, DenseDelta):
            assert delta.values.dtype == np.float32
            assert np.isfinite(delta.values).all()
            continue
        assert len(delta.indices) == len(delta.levels) > 0
        assert delta.indices[0] >= 0
        assert delta.indices[-1] < np.prod(delta.shape)
        assert (np.diff(delta.indices) > 0).all()
        assert (delta.levels != 0).all()
        assert (delta.levels != -128).all()
        assert np.float32(delta.scale) > 0
        assert np.isfinite(np.float32(delta.scale))


@pytest.mark.parametrize("part", range(4))
def test_no_mutation_gets_past_validation(tmp_path: Path, part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "expert"
    samples = [write_sample(path, seed=sample, name="sample").read_bytes() for sample in range(7)]
    samples += [write_sample(path, tensors=packed_newer(seed), name="sample").read_bytes() for seed in range(6)]
    monkeypatch.setattr("store.expert_layout.PLAIN_BYTES", 0)
    samples += [write_sample(path, tensors=packed_newer(seed), name="sample").read_bytes() for seed in range(4)]
    refusals = []
    for seed in range(part * COUNT // 4, (part + 1) * COUNT // 4):
        rng = random.Random(seed)
        good = samples[seed % len(samples)]
        bad = rng.choice(MUTATIONS)(rng, good)
        if bad and rng.random() < 0.2:
            bad = rng.choice([flip_bits, cut, extend, splice])(rng, bad)
        path.write_bytes(bad)
        try:
            validate(path, base_manifest())
        except ExpertFileError as error:
            refusals.append(error)
        else:
            assert_sound(path)
    assert all(error.message and error.param for error in refusals)
    assert len(refusals) > 0.7 * COUNT / 4
