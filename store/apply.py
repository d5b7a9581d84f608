"""From an expert file back to a whole model, offline: what serving must agree with."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from store.checkpoint import Checkpoint, open_checkpoint
from store.deltas import Delta, OverwriteDelta, SparseDelta
from store.expert_file import read_deltas
from store.fingerprint import manifest_of
from store.overwriting import as_float_delta, check_sixteen_bits, new_patterns
from store.patterns import Half, widen
from store.task_vector import load_float32

_TORCH_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
_COMPANIONS = ("*.json", "*.jinja", "*.txt", "*.model")


def apply_expert(
    path: Path,
    base_folder: Path,
    out_folder: Path | None = None,
    *,
    weight: float = 1.0,
    cache_dir: Path | None = None,
) -> dict[str, torch.Tensor]:
    """Merge an expert into its base offline: base + weight · delta in float32, cast to the base's dtype.

    An expert that overwrites gives its fine-tune's own bits at weight 1.

    This is what serving must agree with, computed the plain way; the whole model is in memory.

    Args:
        path: the expert file.
        base_folder: the checkpoint it was made for.
        out_folder: where to also write the merged checkpoint, with the base's tokenizer and configuration.
        weight: multiplier of the whole expert.

    Returns:
        name → merged parameter; tied weights once.

    Raises:
        ExpertFileError, WrongBaseError: as `store.expert_file.validate`.
        CheckpointError: the base folder is unreadable.
    """
    base = open_checkpoint(base_folder)
    state = {name: load_float32(tensor) for name, tensor in base.tensors.items()}
    checked: set[Half] = set()
    for name, delta in read_deltas(path, manifest_of(base_folder, cache_dir)):
        if isinstance(delta, OverwriteDelta) and weight == 1.0 and delta.half not in checked:
            check_sixteen_bits(base, delta.half)
            checked.add(delta.half)
        add(state[name], name, delta, base, weight)
    merged = {name: value.to(_TORCH_DTYPES[base.tensors[name].dtype]) for name, value in state.items()}
    if out_folder is not None:
        out_folder.mkdir(parents=True, exist_ok=True)
        for pattern in _COMPANIONS:
            for companion in base_folder.glob(pattern):
                if not companion.name.endswith(".index.json"):
                    shutil.copy2(companion, out_folder / companion.name)
        save_file(merged, out_folder / "model.safetensors", metadata={"format": "pt"})
    return merged


def add(value: torch.Tensor, name: str, delta: Delta, base: Checkpoint, weight: float = 1.0) -> None:
    """Add weight · delta to a parameter's base values, float32, in place; new bits are set as they are at weight 1."""
    if isinstance(delta, OverwriteDelta) and weight == 1.0:
        new = widen(new_patterns(delta, base.tensors[name], name), delta.half)
        value.view(-1)[torch.from_numpy(delta.indices).long()] = torch.from_numpy(new)
    elif isinstance(delta, SparseDelta):
        levels = torch.from_numpy(delta.levels).float()
        value.view(-1)[torch.from_numpy(delta.indices).long()] += levels * (weight * delta.scale)
    else:
        value += weight * torch.from_numpy(as_float_delta(delta, base, name)).view(value.shape)
