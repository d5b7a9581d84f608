"""Small bases, task vectors and expert files for the tests of this package. NumPy only."""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from store.bfloat16 import to_bfloat16
from store.encodings import as_indices, encode_in_groups, encode_levels, encode_smallest
from store.expert_file import ExpertInfo, write_expert
from store.manifest import BaseManifest
from store.packed import PackedDense, PackedLevels, PackedLowRank, PackedTensor, PackedTernary

SHAPES: dict[str, tuple[int, ...]] = {
    "embed.weight": (37, 16),
    "layers.0.mlp.weight": (32, 24),
    "layers.0.norm.weight": (16,),
    "layers.1.mlp.weight": (9, 5, 7),
}


def base_manifest(seed: int = 0) -> BaseManifest:
    return BaseManifest(hashlib.sha256(b"base %d" % seed).hexdigest(), dict(SHAPES))


def random_positions(rng: np.random.Generator, numel: int, density: float) -> tuple[npt.NDArray[np.int64], ...]:
    indices = np.flatnonzero(rng.random(numel) < density)
    return indices, np.where(rng.random(len(indices)) < 0.5, 1, -1).astype(np.int8)


def packed_ternary(rng: np.random.Generator, shape: tuple[int, ...], density: float) -> PackedTernary:
    numel = int(np.prod(shape))
    indices, levels = random_positions(rng, numel, density)
    if not len(indices):
        indices, levels = np.array([numel // 2]), np.array([1], dtype=np.int8)
    encoded = encode_smallest(as_indices(indices, numel), levels, numel)
    return PackedTernary(shape, len(indices), float(np.float32(rng.uniform(1e-4, 1e-2))), encoded)


def packed_dense(rng: np.random.Generator, shape: tuple[int, ...]) -> PackedDense:
    return PackedDense(shape, to_bfloat16(rng.normal(size=shape).astype(np.float32)).tobytes())


def packed_levels(rng: np.random.Generator, shape: tuple[int, ...], density: float) -> PackedLevels:
    numel = int(np.prod(shape))
    indices, signs = random_positions(rng, numel, density)
    if not len(indices):
        indices, signs = np.array([numel // 2]), np.array([1], dtype=np.int8)
    levels = (np.minimum(rng.geometric(0.2, len(indices)), 127) * signs).astype(np.int8)
    encoded = encode_levels(as_indices(indices, numel), levels, numel)
    return PackedLevels(shape, len(indices), float(np.float32(rng.uniform(1e-4, 1e-2))), encoded)


def packed_low_rank(rng: np.random.Generator, shape: tuple[int, int], rank: int) -> PackedLowRank:
    factors = rng.normal(size=rank * sum(shape)).astype(np.float32)
    return PackedLowRank(shape, to_bfloat16(factors).tobytes(), rank)


def packed_newer(seed: int = 0) -> dict[str, PackedTensor]:
    """An expert of the kinds and layouts that `required_features` announces."""
    rng = np.random.default_rng(seed)
    indices, levels = random_positions(rng, 9 * 5 * 7, 0.3)
    grouped = encode_in_groups(as_indices(indices, 9 * 5 * 7), levels, 9 * 5 * 7, 8)
    return {
        "embed.weight": packed_levels(rng, SHAPES["embed.weight"], 0.05),
        "layers.0.mlp.weight": packed_low_rank(rng, (32, 24), 3),
        "layers.0.norm.weight": packed_levels(rng, SHAPES["layers.0.norm.weight"], 0.9),
        "layers.1.mlp.weight": PackedTernary(SHAPES["layers.1.mlp.weight"], len(indices), 0.125, grouped),
    }


def packed_expert(seed: int = 0) -> dict[str, PackedTensor]:
    rng = np.random.default_rng(seed)
    return {
        "embed.weight": packed_ternary(rng, SHAPES["embed.weight"], 0.05),
        "layers.0.mlp.weight": packed_ternary(rng, SHAPES["layers.0.mlp.weight"], 0.5),
        "layers.0.norm.weight": packed_dense(rng, SHAPES["layers.0.norm.weight"]),
        "layers.1.mlp.weight": packed_ternary(rng, SHAPES["layers.1.mlp.weight"], 0.2),
    }


def write_sample(path: Path, seed: int = 0, tensors: Mapping[str, PackedTensor] | None = None, **info: object) -> Path:
    """A valid expert file for `base_manifest()`; another seed, another digest."""
    fields: dict[str, object] = {
        "codec": "t-switch",
        "codec_params": {"knob": "l1", "density": 0.05},
        "tool": "tests",
        "description": "a sample",
        "exemplars": ("Was ist das?", 'Say "hé"'),
        **info,
    }
    write_expert(path, ExpertInfo(**fields), tensors or packed_expert(seed), base_manifest())  # type: ignore[arg-type]
    return path


def split_file(data: bytes) -> tuple[dict[str, object], bytes]:
    """A safetensors file as (header, data)."""
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join_file(header: Mapping[str, object], data: bytes) -> bytes:
    raw = json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def document_of(data: bytes) -> dict[str, Any]:
    """The expert header in a file's bytes, plain or compact."""
    table, payload = split_file(data)
    document: dict[str, Any] = json.loads(table["__metadata__"]["switchyard"])  # type: ignore[index]
    if "compact" not in document["required_features"]:
        return document
    start, stop = table["header"]["data_offsets"]  # type: ignore[index]
    inner: dict[str, Any] = json.loads(zlib.decompress(payload[start:stop]))
    return inner


def with_document(data: bytes, document: object) -> bytes:
    """The file with another expert header, in the same layout."""
    table, payload = split_file(data)
    if "header" in table:
        return compact_file(zlib.compress(json.dumps(document).encode()), payload[table["header"]["shape"][0] :])  # type: ignore[index]
    table["__metadata__"] = {"switchyard": json.dumps(document)}
    return join_file(table, payload)


def compact_file(deflated: bytes, payloads: bytes) -> bytes:
    """A compact file of these bytes, whatever they are."""
    spans = {"header": (0, len(deflated)), "data": (len(deflated), len(deflated) + len(payloads))}
    outer = {"switchyard": json.dumps({"format": 1, "required_features": ["compact"]})}
    table = {name: {"dtype": "U8", "shape": [b - a], "data_offsets": [a, b]} for name, (a, b) in spans.items()}
    return join_file({"__metadata__": outer, **table}, deflated + payloads)
