"""GGUF → safetensors, once: dequantising takes tens of seconds, the converted folder loads in under one."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from store.errors import CheckpointError

_NOT_CONFIG = ("quantization_config", "_name_or_path", "dtype", "torch_dtype", "architectures", "model_type")


def convert_gguf(gguf: Path, cache_dir: Path) -> Path:
    """Dequantise a GGUF file to a float32 checkpoint folder under `cache_dir`, or return the one already there.

    The folder is named by the file's content, so a changed file is converted anew. It appears complete or not at all.

    Raises:
        CheckpointError: transformers cannot read the file.
    """
    digest = _sha256(gguf)
    folder = cache_dir / "base" / f"{gguf.stem.lower()}-{digest[:16]}"
    if (folder / "config.json").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _convert(gguf, partial)
        os.replace(partial, folder)
    except OSError:
        if not (folder / "config.json").is_file():  # else another process was first, with the same content
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _convert(gguf: Path, folder: Path) -> None:
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(**source)
        quantised = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    except (ValueError, KeyError, OSError, NotImplementedError) as error:
        raise CheckpointError(f"{gguf.name} cannot be read as a GGUF model: {error}", param="base") from error
    # A model loaded from GGUF refuses to be saved; its weights in a fresh model of the same shape do not.
    config = {key: value for key, value in quantised.config.to_dict().items() if key not in _NOT_CONFIG}
    plain = type(quantised)(type(quantised.config)(**config))
    plain.load_state_dict({name: tensor.detach().clone() for name, tensor in quantised.state_dict().items()})
    plain.tie_weights()
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
