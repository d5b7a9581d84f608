"""The identity of a base model: a digest of its weights that does not depend on how they are stored. No torch."""

from __future__ import annotations

import hashlib
import json
import tempfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt

from store.bfloat16 import to_bfloat16
from store.checkpoint import Checkpoint, CheckpointTensor, open_checkpoint, weight_files
from store.expert_info import DIGEST_PATTERN
from store.manifest import BaseManifest
from store.strict_json import FieldError, Fields, parse_json

_DOMAIN = b"switchyard base v1\n"
_CHUNK = 1 << 22
"""Elements rounded at a time: 16 MB of float32."""


def manifest_of(folder: Path, cache_dir: Path | None) -> BaseManifest:
    """Fingerprint and tensor shapes of a safetensors checkpoint folder.

    The fingerprint is sha256 over every parameter, sorted by name: its name, its shape, and its values rounded to
    bfloat16 (nearest, ties to even). A float32 and a bfloat16 copy of one bfloat16 model therefore agree; so does any
    sharding. docs/expert-file.md gives the exact bytes.

    Args:
        folder: the checkpoint.
        cache_dir: where to remember the result, keyed by path, sizes and modification times; None to compute afresh.

    Raises:
        CheckpointError: the folder is no readable safetensors checkpoint.
    """
    checkpoint = open_checkpoint(folder)
    cached = _cache_file(folder, cache_dir) if cache_dir is not None else None
    fingerprint = _recall(cached) if cached is not None else None
    if fingerprint is None:
        fingerprint = fingerprint_of(checkpoint)
        if cached is not None:
            _remember(cached, fingerprint)
    return BaseManifest(fingerprint, checkpoint.shapes)


def fingerprint_of(checkpoint: Checkpoint) -> str:
    """The fingerprint of a checkpoint's weights; see `manifest_of`."""
    digest = hashlib.sha256(_DOMAIN)
    for name, tensor in checkpoint.tensors.items():
        shape = ",".join(str(dim) for dim in tensor.shape)
        digest.update(f"{name}\0{shape}\0".encode())
        values = tensor.read().reshape(-1)
        for start in range(0, len(values), _CHUNK):
            digest.update(_bfloat16_bits(tensor, values[start : start + _CHUNK]).astype("<u2").tobytes())
    return digest.hexdigest()


def _bfloat16_bits(tensor: CheckpointTensor, values: npt.NDArray[np.generic]) -> npt.NDArray[np.uint16]:
    return values.astype(np.uint16) if tensor.dtype == "BF16" else to_bfloat16(values.astype(np.float32))


def _cache_file(folder: Path, cache_dir: Path) -> Path:
    paths = [*weight_files(folder), *([folder / "config.json"] if (folder / "config.json").is_file() else [])]
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    key = hashlib.sha256(json.dumps([_DOMAIN.decode(), str(folder.resolve()), stats]).encode()).hexdigest()
    return cache_dir / f"fingerprint-{key[:32]}.json"


def _recall(cached: Path) -> str | None:
    with suppress(OSError, FieldError):
        fields = Fields(parse_json(cached.read_bytes(), cached.name), cached.name)
        return fields.text("fingerprint", max_bytes=64, pattern=DIGEST_PATTERN)
    return None


def _remember(cached: Path, fingerprint: str) -> None:
    """A cache that cannot be written costs a second per start, no more; so it is not an error."""
    with suppress(OSError):
        cached.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=cached.parent, prefix=".fingerprint-", delete=False) as file:
            json.dump({"fingerprint": fingerprint}, file)
        Path(file.name).replace(cached)
