"""A model checkpoint on disk: the safetensors files of a folder as one set of named tensors. No torch, no pickle."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from store.errors import CheckpointError
from store.strict_json import FieldError, Fields, parse_json
from store.tensor_file import TensorSpan, read_tensor_table

MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors format itself."""
_MAX_JSON_BYTES = 64 << 20
_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_HEAD = "lm_head.weight"
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
_FLOATS = {"F16": "<f2", "BF16": "<u2", "F32": "<f4", "F64": "<f8"}
_BUFFERS = {"BOOL", "I16", "I32", "I64"}
"""Masks and position ids that older checkpoints carry along; no parameter has such a type."""
_CHUNK = 1 << 22


@dataclass(frozen=True)
class CheckpointTensor:
    """Where one parameter lies."""

    path: Path
    span: TensorSpan

    @property
    def shape(self) -> tuple[int, ...]:
        return self.span.shape

    @property
    def dtype(self) -> str:
        """The safetensors word: F16, BF16, F32 or F64."""
        return self.span.dtype

    def read(self) -> npt.NDArray[np.generic]:
        """The values, read-only and memory-mapped, in the tensor's shape; bfloat16 as uint16 bit patterns."""
        if not self.span.numel:
            return np.empty(self.shape, dtype=_FLOATS[self.dtype])
        return np.memmap(self.path, dtype=_FLOATS[self.dtype], mode="r", offset=self.span.start, shape=self.shape)


@dataclass(frozen=True)
class Checkpoint:
    """The parameters of a checkpoint folder by name, sorted; a tied output layer is left out."""

    folder: Path
    tensors: dict[str, CheckpointTensor]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self.tensors.items()}


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint folder: `model.safetensors`, those of its index, or the only one there is.

    Raises:
        CheckpointError: there is none; with what to do where the weights are pickled.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder.name} is not a folder with a checkpoint")
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    if (folder / _INDEX).is_file():
        return _sharded(folder)
    found = sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return found
    if found:
        raise CheckpointError(f"{folder.name} holds {len(found)} safetensors files but no {_INDEX} that orders them")
    if any(next(folder.glob(pattern), None) for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt")):
        raise CheckpointError(
            f"{folder.name} holds pickled weights only; pickle can run code and is never read here. Where you trust "
            "them, convert once: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(OUT) writes safetensors"
        )
    raise CheckpointError(f"{folder.name} holds no {_SINGLE}")


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read and check the headers of a checkpoint; no weights are read yet, except to compare a tied output layer.

    Raises:
        CheckpointError: the folder is no readable safetensors checkpoint of unquantised weights.
    """
    tensors: dict[str, CheckpointTensor] = {}
    for path in weight_files(folder):
        for name, tensor in read_tensors(path).items():
            if name in tensors:
                raise CheckpointError(f"tensor {name} is in two files of {folder.name}", param=name)
            tensors[name] = tensor
    if _head_is_tied(folder, tensors):
        del tensors[_HEAD]
    return Checkpoint(folder, dict(sorted(tensors.items())))


def read_tensors(path: Path) -> dict[str, CheckpointTensor]:
    """The parameters in one safetensors file; buffers are left out.

    Raises:
        CheckpointError: it is no readable safetensors file of unquantised weights.
    """
    try:
        with path.open("rb") as file:
            table = read_tensor_table(file, max_header=MAX_HEADER_BYTES)
    except FieldError as error:
        raise CheckpointError(f"{path.name}: {error.field} {error.message}", param=error.field) from None
    except OSError as error:
        raise CheckpointError(f"cannot read {path.name}: {error.strerror}") from None
    tensors = {}
    for name, span in table.tensors.items():
        if span.dtype in _BUFFERS or name.endswith("rotary_emb.inv_freq"):
            continue
        if span.dtype not in _FLOATS:
            raise CheckpointError(
                f"tensor {name} is stored as {span.dtype}: quantised checkpoints have no task vector; "
                "use the float16, bfloat16 or float32 weights",
                param=name,
            )
        tensors[name] = CheckpointTensor(path, span)
    return tensors


def _sharded(folder: Path) -> list[Path]:
    try:
        weight_map = Fields(read_json(folder / _INDEX), _INDEX).child("weight_map")
        names = {weight_map.text(key, max_bytes=255) for key in weight_map.names()}
    except FieldError as error:
        raise CheckpointError(f"{_INDEX}: {error.field} {error.message}") from None
    for name in sorted(names):
        if "/" in name or "\\" in name or not (folder / name).is_file():
            raise CheckpointError(f"{_INDEX} names the file {name}, which is not in {folder.name}")
    return [folder / name for name in sorted(names)]


def _head_is_tied(folder: Path, tensors: dict[str, CheckpointTensor]) -> bool:
    """True if the output layer is stored although it is the embedding.

    Configurations leave `tie_word_embeddings` out where it has the architecture's default, so then the values decide.
    """
    embedding = next((name for name in tensors if name.endswith(_EMBEDDINGS)), None)
    if _HEAD not in tensors or embedding is None:
        return False
    declared = _declared_tie(folder)
    if declared is False:
        return False
    equal = _equal(tensors[_HEAD], tensors[embedding])
    if declared and not equal:
        raise CheckpointError(
            f"config.json ties {_HEAD} to {embedding}, but the checkpoint holds different values for them; "
            'set "tie_word_embeddings" to what the model was trained with',
            param=_HEAD,
        )
    return equal


def _declared_tie(folder: Path) -> bool | None:
    if not (folder / "config.json").is_file():
        return None
    try:
        fields = Fields(read_json(folder / "config.json"), "config.json")
        for config in (fields, fields.child("text_config") if fields.has("text_config") else fields):
            if config.has("tie_word_embeddings"):
                return config.get("tie_word_embeddings") is True
    except FieldError as error:
        raise CheckpointError(f"config.json: {error.field} {error.message}") from None
    return None


def _equal(left: CheckpointTensor, right: CheckpointTensor) -> bool:
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    rows = max(1, _CHUNK // max(1, math.prod(left.shape[1:])))
    first, second = left.read(), right.read()
    return all(
        np.array_equal(first[row : row + rows], second[row : row + rows]) for row in range(0, left.shape[0], rows)
    )


def read_json(path: Path) -> object:
    """A JSON file of a checkpoint, bounded and parsed strictly.

    Raises:
        CheckpointError: it cannot be read.
        FieldError: it is too large, or no JSON.
    """
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise FieldError("is too large", path.name)
        return parse_json(path.read_bytes(), path.name)
    except OSError as error:
        raise CheckpointError(f"cannot read {path.name}: {error.strerror}") from None
