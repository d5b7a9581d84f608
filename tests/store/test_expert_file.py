from __future__ import annotations

import json
import os
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from store.bfloat16 import from_bfloat16, to_bfloat16
from store.deltas import DenseDelta, SparseDelta
from store.encodings import as_indices, encode_levels, encode_smallest
from store.errors import ExpertFileError, ExpertUnavailableError, InvalidRequestError, StoreError, WrongBaseError
from store.expert_file import (
    MAX_HEADER_BYTES,
    ExpertInfo,
    digest_of,
    read_deltas,
    read_header,
    validate,
    write_expert,
)
from store.expert_header import ExpertHeader, TernaryEntry
from store.manifest import BaseManifest
from store.packed import PackedLevels, PackedLowRank, PackedTernary
from tests.store.builders import (
    SHAPES,
    base_manifest,
    document_of,
    join_file,
    packed_dense,
    packed_expert,
    packed_newer,
    packed_ternary,
    split_file,
    with_document,
    write_sample,
)


def edit(path: Path, **changes: object) -> Path:
    """Rewrite fields of our JSON header; a None removes the field."""
    document = document_of(path.read_bytes()) | changes
    path.write_bytes(with_document(path.read_bytes(), {k: v for k, v in document.items() if v is not None}))
    return path


def edit_tensor(path: Path, tensor: str, **changes: object) -> Path:
    document = document_of(path.read_bytes())
    document["tensors"][tensor].update(changes)
    return edit(path, tensors=document["tensors"])


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    path = tmp_path / "expert.safetensors"
    info = ExpertInfo(
        codec="t-switch",
        codec_params={"knob": "calibrated", "multiplier": 2.5, "density": 0.05},
        tool="switchyard 0.1.0",
        created=1_790_000_000,
        name="cron",
        description="schedules – plánování",
        exemplars=("every day at 5", '"quoted"\n\\ 🙂'),
    )
    tensors = packed_expert()
    written = write_expert(path, info, tensors, base_manifest())
    assert read_header(path) == validate(path, base_manifest()) == written
    assert {field: getattr(written, field) for field in vars(info)} == vars(info)
    deltas = dict(read_deltas(path, base_manifest()))
    assert deltas.keys() == tensors.keys() == SHAPES.keys()
    for name, delta in deltas.items():
        expected = tensors[name].decode(name)
        assert delta.shape == expected.shape == SHAPES[name]
        if isinstance(expected, DenseDelta):
            assert isinstance(delta, DenseDelta)
            np.testing.assert_array_equal(delta.values, expected.values)
        else:
            assert isinstance(delta, SparseDelta)
            assert delta.scale == expected.scale
            np.testing.assert_array_equal(delta.indices, expected.indices)
            np.testing.assert_array_equal(delta.levels, expected.levels)


def test_newer_kinds_are_announced_and_survive(tmp_path: Path) -> None:
    tensors = packed_newer()
    path = write_sample(tmp_path / "e", tensors=tensors)
    header = validate(path, base_manifest())
    assert header.required_features == ("grouped", "levels", "low-rank")
    sparse = [tensor for tensor in tensors.values() if isinstance(tensor, PackedTernary)]
    assert header.density == sum(tensor.nnz for tensor in sparse) / sum(tensor.numel for tensor in sparse)
    for name, delta in read_deltas(path, base_manifest()):
        expected = tensors[name].decode(name)
        assert type(delta) is type(expected)
        for key, value in vars(expected).items():
            np.testing.assert_array_equal(vars(delta)[key], value)
    low_rank = tensors["layers.0.mlp.weight"]
    factors = from_bfloat16(np.frombuffer(low_rank.payload, dtype="<u2")).astype(np.float64)
    product = factors[: 32 * 3].reshape(32, 3) @ factors[32 * 3 :].reshape(3, 24)
    np.testing.assert_allclose(dict(read_deltas(path, base_manifest()))["layers.0.mlp.weight"].values, product, 1e-5)  # type: ignore[union-attr]


def test_a_file_for_the_first_readers_stays_one(tmp_path: Path) -> None:
    assert read_header(write_sample(tmp_path / "e")).required_features == ()


@pytest.mark.parametrize(
    ("tensor", "changes", "fault"),
    [
        ("embed.weight", {"values": 0}, "between"),
        ("embed.weight", {"values": 10**6}, "hold"),
        ("embed.weight", {"values": None}, "missing"),
        ("embed.weight", {"top": 127}, "instead of 127"),
        ("embed.weight", {"top": 128}, "between"),
        ("embed.weight", {"encoding": "bitmap"}, "bitmap needs"),
        ("embed.weight", {"kind": "ternary"}, "hold|density|has"),
        ("layers.0.mlp.weight", {"rank": 0}, "between"),
        ("layers.0.mlp.weight", {"rank": 25}, "between"),
        ("layers.0.mlp.weight", {"rank": 4}, "not BF16"),
        ("layers.0.mlp.weight", {"shape": [768]}, "two dimensions"),
        ("layers.1.mlp.weight", {"group": 257}, "between"),
        ("layers.1.mlp.weight", {"group": 16}, "groups of 16 need|hold"),
    ],
)
def test_faults_of_newer_kinds(tmp_path: Path, tensor: str, changes: dict[str, object], fault: str) -> None:
    path = edit_tensor(write_sample(tmp_path / "e", tensors=packed_newer()), tensor, **changes)
    with pytest.raises(ExpertFileError, match=fault) as caught:
        validate(path, base_manifest())
    assert caught.value.param == tensor


def test_an_unannounced_kind_is_refused(tmp_path: Path) -> None:
    path = edit(write_sample(tmp_path / "e", tensors=packed_newer()), required_features=["grouped", "low-rank"])
    with pytest.raises(ExpertFileError, match="lacks levels"):
        read_header(path)


def test_factors_too_large_to_multiply(tmp_path: Path) -> None:
    huge = PackedLowRank((32, 24), to_bfloat16(np.full(56, 1e30, dtype=np.float32)).tobytes(), 1)
    path = write_sample(tmp_path / "e", tensors={"layers.0.mlp.weight": huge})
    with pytest.raises(ExpertFileError, match="too large to multiply"):
        validate(path, base_manifest())


def test_density_and_bits_per_parameter_are_what_they_say(tmp_path: Path) -> None:
    header = read_header(write_sample(tmp_path / "e"))
    tensors = packed_expert()
    ternary = [entry for entry in header.tensors.values() if isinstance(entry, TernaryEntry)]
    assert header.density == sum(entry.nnz for entry in ternary) / (37 * 16 + 32 * 24 + 9 * 5 * 7)
    payload = sum(tensor.nbytes for tensor in tensors.values())
    assert header.bits_per_param == 8 * payload / (37 * 16 + 32 * 24 + 16 + 9 * 5 * 7)


def test_equal_input_gives_equal_bytes(tmp_path: Path) -> None:
    first, second = write_sample(tmp_path / "a"), write_sample(tmp_path / "b")
    assert first.read_bytes() == second.read_bytes()
    assert digest_of(first) == digest_of(second) != digest_of(write_sample(tmp_path / "c", seed=1))


def test_the_safetensors_library_reads_it(tmp_path: Path) -> None:
    with safe_open(write_sample(tmp_path / "e"), framework="np") as file:
        assert set(file.keys()) == set(SHAPES)
        assert json.loads(file.metadata()["switchyard"])["format"] == 1
        assert file.get_tensor("embed.weight").dtype == np.uint8


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shapes=st.lists(st.lists(st.integers(1, 9), max_size=4), max_size=5),
    densities=st.lists(st.floats(0, 1), min_size=5, max_size=5),
    exemplars=st.lists(st.text(max_size=40), max_size=4),
    description=st.text(max_size=60),
    seed=st.integers(0, 2**31),
)
def test_any_expert_survives_the_file(
    tmp_path: Path, shapes: list[list[int]], densities: list[float], exemplars: list[str], description: str, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    base = BaseManifest("a" * 64, {f"t{row}": tuple(shape) for row, shape in enumerate(shapes)})
    tensors = {
        name: packed_dense(rng, shape) if densities[row] < 0.2 else packed_ternary(rng, shape, densities[row])
        for row, (name, shape) in enumerate(base.tensors.items())
    }
    info = ExpertInfo(codec="t-switch", tool="tests", description=description, exemplars=tuple(exemplars))
    header = write_expert(tmp_path / "e", info, tensors, base)
    assert validate(tmp_path / "e", base) == header
    assert header.exemplars == tuple(exemplars)
    for name, delta in read_deltas(tmp_path / "e", base):
        expected = tensors[name].decode(name)
        left, right = (vars(expected), vars(delta))
        for key in left:
            np.testing.assert_array_equal(left[key], right[key])


def test_another_base_is_refused_with_both_fingerprints(tmp_path: Path) -> None:
    path, other = write_sample(tmp_path / "e"), base_manifest(seed=1)
    with pytest.raises(WrongBaseError) as caught:
        validate(path, other)
    assert base_manifest().fingerprint[:12] in caught.value.message
    assert other.fingerprint[:12] in caught.value.message
    with pytest.raises(WrongBaseError):
        next(read_deltas(path, other))


@pytest.mark.parametrize(
    ("changes", "param", "fault"),
    [
        ({"format": 2}, "format", "version 1"),
        ({"format": None}, "format", "missing"),
        ({"format": True}, "format", "integer"),
        ({"required_features": ["zstd"]}, "required_features", "zstd"),
        ({"base_fingerprint": "A" * 64}, "base_fingerprint", "must match"),
        ({"base_fingerprint": 7}, "base_fingerprint", "string"),
        ({"name": "Cron"}, "name", "must match"),
        ({"name": "../../etc/passwd"}, "name", "must match"),
        ({"name": "x" * 65}, "name", "longer"),
        ({"exemplars": ["a"] * 1025}, "exemplars", "more than"),
        ({"exemplars": ["a" * 8193]}, "exemplars", "too long"),
        ({"exemplars": [1]}, "exemplars", "no string"),
        ({"exemplars": "abc"}, "exemplars", "list"),
        ({"description": "x" * 2001}, "description", "longer"),
        ({"created": -1}, "created", "between"),
        ({"density": 0.5}, "density", "counts"),
        ({"density": 2}, "density", "between"),
        ({"bits_per_param": 1.0}, "bits_per_param", "the file has"),
        ({"codec": "T Switch"}, "codec", "must match"),
        ({"codec_params": {"a": [1]}}, "codec_params.a", "string"),
        ({"codec_params": {str(i): 1 for i in range(33)}}, "codec_params", "more than"),
        ({"tensors": {}}, "embed.weight", "described and stored"),
        ({"tensors": []}, "tensors", "object"),
    ],
)
def test_header_faults_name_the_field(tmp_path: Path, changes: dict[str, object], param: str, fault: str) -> None:
    path = edit(write_sample(tmp_path / "e"), **changes)
    if changes.keys() == {"tensors"} and changes["tensors"] == {}:
        edit(path, density=0.0)
    with pytest.raises(ExpertFileError, match=fault) as caught:
        validate(path, base_manifest())
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"kind": "dense"}, "counts"),
        ({"kind": "sparse"}, "knows ternary"),
        ({"shape": [16, 37]}, "the base's has"),
        ({"shape": [37, 17]}, "shape has"),
        ({"shape": [37, -16]}, "integers"),
        ({"shape": [1] * 9}, "more than 8"),
        ({"shape": [2**38], "numel": 2**38}, "counts"),
        ({"shape": [2**20] * 3, "numel": 2**60}, "elements"),
        ({"numel": 593}, "elements"),
        ({"nnz": 0}, "between"),
        ({"nnz": 593}, "between"),
        ({"nnz": 1}, "ones|hold|density|counts"),
        ({"scale": 0}, "above zero"),
        ({"scale": -0.5}, "between"),
        ({"scale": 0.1}, "float32"),
        ({"scale": 1e39}, "between"),
        ({"scale": 10**400}, "between"),
        ({"scale": "1"}, "number"),
        ({"scale": True}, "number"),
        ({"encoding": "zip"}, "knows"),
        ({"encoding": "bitmap"}, "needs"),
        ({"k": 0}, "between"),
        ({"k": 25}, "between"),
        ({"k": 1.5}, "integer"),
    ],
)
def test_tensor_faults_name_the_tensor(tmp_path: Path, changes: dict[str, object], fault: str) -> None:
    path = edit_tensor(write_sample(tmp_path / "e"), "embed.weight", **changes)
    tracemalloc.start()
    try:
        with pytest.raises(ExpertFileError, match=fault) as caught:
            validate(path, base_manifest())
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()
    assert caught.value.param in ("embed.weight", "density")


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ('"scale":', '"scale":NaN,"was":', "NaN"),
        ('"scale":', '"scale":1e999,"was":', "too large"),
        ('"density":', '"density":0.5,"density":', "twice"),
        ('"tool":"tests"', '"tool":"\\ud800"', "UTF-8"),
        ('"tool":"tests"', '"tool":' + "[" * 100_000, "JSON|nested"),
        ('"tool":"tests"', '"tool":' + "9" * 5000, "JSON"),
    ],
)
def test_json_that_the_standard_leaves_open_is_refused(tmp_path: Path, old: str, new: str, fault: str) -> None:
    path = write_sample(tmp_path / "e")
    table, data = split_file(path.read_bytes())
    text = table["__metadata__"]["switchyard"]  # type: ignore[index]
    table["__metadata__"] = {"switchyard": text.replace(old, new, 1)}
    path.write_bytes(join_file(table, data))
    with pytest.raises(ExpertFileError, match=fault):
        read_header(path)


def test_container_faults(tmp_path: Path) -> None:
    path = write_sample(tmp_path / "e")
    good = path.read_bytes()
    table, data = split_file(good)
    no_meta = {key: value for key, value in table.items() if key != "__metadata__"}
    dense = {"dtype": "BF16", "shape": [16], "data_offsets": [0, 32]}
    cases = {
        b"": "too short",
        b"\0" * 7: "too short",
        (MAX_HEADER_BYTES + 1).to_bytes(8, "little") + good[8:]: "at most",
        b"\xff" * 8 + good[8:]: "at most",
        good[:-1]: "lie outside|cut short",
        good[: len(good) // 2]: "cut short",
        good + b"\0": "appended",
        b"PK\x03\x04" + good: "at most",
        join_file(no_meta, data): "not an expert file",
        join_file({**table, "extra": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}, data): "described",
        join_file({**table, "layers.0.norm.weight": {**dense, "data_offsets": [1, 33]}}, data): "gap",
        join_file({**table, "layers.0.norm.weight": {**dense, "dtype": "F16"}}, data): "BF16",
        join_file({**table, "layers.0.norm.weight": {**dense, "dtype": "F32"}}, data): "bytes of data",
        join_file({**table, "layers.0.norm.weight": {**dense, "more": 1}}, data): "exactly the keys",
        join_file({**table, "layers.0.norm.weight": {**dense, "data_offsets": [32, 0]}}, data): "outside",
        join_file({**table, "layers.0.norm.weight": {**dense, "data_offsets": [0, 10**30]}}, data): "outside",
    }
    for content, fault in cases.items():
        path.write_bytes(content)
        with pytest.raises(ExpertFileError, match=fault):
            read_header(path)


def test_raw_values_must_be_finite(tmp_path: Path) -> None:
    path = write_sample(tmp_path / "e")
    table, data = split_file(path.read_bytes())
    path.write_bytes(join_file(table, b"\xc0\x7f" + data[2:]))
    with pytest.raises(ExpertFileError, match=r"layers\.0\.norm\.weight holds NaN"):
        validate(path, base_manifest())


def test_a_missing_file_is_no_crash_and_no_fault_of_the_file(tmp_path: Path) -> None:
    with pytest.raises(ExpertUnavailableError, match="cannot read none: there is no such file"):
        read_header(tmp_path / "none")
    with pytest.raises(ExpertFileError, match="cannot read"):
        read_header(tmp_path)


def test_writing_refuses_what_reading_would(tmp_path: Path) -> None:
    info = ExpertInfo(codec="t-switch", tool="tests")
    rng = np.random.default_rng(0)
    for bad_info, tensors in [
        (replace(info, name="Bad Name"), packed_expert()),
        (replace(info, exemplars=("x" * 8000,) * 200), packed_expert()),
        (info, {"embed.weight": packed_ternary(rng, (16, 37), 0.1)}),
        (info, {"unknown": packed_ternary(rng, (16, 37), 0.1)}),
        (info, {"embed.weight": replace(packed_ternary(rng, (37, 16), 0.1), scale=float("inf"))}),
    ]:
        with pytest.raises((InvalidRequestError, ValueError)):
            write_expert(tmp_path / "e", bad_info, tensors, base_manifest())
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match="No space"):
        write_sample(tmp_path / "e")
    assert list(tmp_path.iterdir()) == []


def test_headers_are_values(tmp_path: Path) -> None:
    header = read_header(write_sample(tmp_path / "e"))
    assert isinstance(header, ExpertHeader)
    with pytest.raises(AttributeError):
        header.density = 1.0  # type: ignore[misc]


def test_reading_experts_needs_no_torch() -> None:
    modules = ["expert_file", "encodings", "registry", "backends.disk", "fingerprint", "manifest", "deltas"]
    code = "import sys\n" + "".join(f"import store.{module}\n" for module in modules)
    code += "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("scale", [3.4e38, float(np.finfo(np.float32).max) / 100])
def test_values_that_decode_to_infinity_are_refused(tmp_path: Path, scale: float) -> None:
    """A level times its scale may leave float32; a scale alone may be infinite once it is rounded to bfloat16."""
    name, scale = "layers.0.mlp.weight", float(np.float32(scale))
    numel, place = int(np.prod(SHAPES[name])), as_indices(np.array([3]), 1)
    levels = PackedLevels(SHAPES[name], 1, scale, encode_levels(place, np.array([127], np.int8), numel))
    ternary = PackedTernary(SHAPES[name], 1, scale, encode_smallest(place, np.array([1], np.int8), numel))
    largest = float(np.float32(2.0**127))
    for packed, is_sound in (
        (levels, False),
        (ternary, scale < 3.39e38),
        (replace(ternary, scale=largest), True),
        (replace(levels, scale=float(np.float32(largest / 127))), True),
    ):
        path = write_sample(tmp_path / "e", tensors={name: packed})
        if is_sound:
            validate(path, base_manifest())
            continue
        with pytest.raises(ExpertFileError, match="too large for bfloat16") as caught:
            validate(path, base_manifest())
        assert caught.value.param == name
