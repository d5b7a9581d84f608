"""Where the base comes from, and on which device and in which dtype it is to run."""

from __future__ import annotations

from pathlib import Path

import torch

from server.engine.gguf import convert_gguf
from store.errors import CheckpointError, InvalidRequestError

_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "*.txt"]


def resolve_base(spec: str, cache_dir: Path) -> Path:
    """Turn a base specification into a local checkpoint folder.

    Args:
        spec: a folder with `config.json` and safetensors, a `.gguf` file (converted once under `cache_dir`), or a
            hub id such as `org/model` (downloaded to the hub's own cache).

    Raises:
        CheckpointError: nothing of the kind is there.
    """
    path = Path(spec).expanduser()
    if path.is_dir():
        return path
    if path.suffix == ".gguf":
        if not path.is_file():
            raise CheckpointError(f"there is no GGUF file {path}", param="base")
        return convert_gguf(path, cache_dir)
    if path.is_absolute() or spec.startswith(".") or spec.count("/") != 1:
        raise CheckpointError(f"{spec} is no folder, no .gguf file and no hub id (org/model)", param="base")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(spec, allow_patterns=_HUB_FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(f"the base {spec} could not be downloaded: {error}", param="base") from error


def choose_device(device: str) -> torch.device:
    """`"auto"` is CUDA where there is one, else the CPU.

    Raises:
        InvalidRequestError: there is no such device here.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise InvalidRequestError(f"the device {device} cannot be used: {error}", param="device") from error


def choose_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """`"auto"` is bfloat16 on a GPU and float32 on a CPU.

    Raises:
        InvalidRequestError: no such dtype.
    """
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in known:
        raise InvalidRequestError(f"dtype must be auto, {', '.join(known)}; not {dtype}", param="dtype")
    return known[dtype]
