"""The task vector: fine-tuned − base, tensor by tensor, neither model ever in memory as a whole."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from store.checkpoint import Checkpoint, CheckpointTensor, open_checkpoint
from store.errors import CheckpointError

_NAMED = 5
"""Names shown in a message before "and N more"."""


def task_vector(base_folder: Path, tuned_folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Stream `(name, delta)` for every parameter, sorted by name; tied weights once.

    Args:
        base_folder: checkpoint folder of the base (safetensors; float16, bfloat16 or float32).
        tuned_folder: checkpoint folder of its full fine-tune, in any of these types.

    Yields:
        The parameter's name and tuned − base in float32, in the parameter's shape.

    Raises:
        CheckpointError: at the first `next`: the folders do not hold the same parameters in the same shapes.
    """
    yield from deltas_between(open_checkpoint(base_folder), open_checkpoint(tuned_folder))


def deltas_between(base: Checkpoint, tuned: Checkpoint) -> Iterator[tuple[str, torch.Tensor]]:
    """`task_vector` of two open checkpoints."""
    check_same_parameters(base, tuned)
    for name, tensor in base.tensors.items():
        delta = load_float32(tuned.tensors[name])
        yield name, delta.sub_(load_float32(tensor))


def load_float32(tensor: CheckpointTensor) -> torch.Tensor:
    """One parameter as a new float32 tensor."""
    values = np.array(tensor.read())  # a copy: the map is read-only and goes away
    if tensor.dtype == "BF16":
        return torch.from_numpy(values.astype(np.uint16, copy=False)).view(torch.bfloat16).float()
    return torch.from_numpy(values.astype(np.float32, copy=False))


def check_same_parameters(base: Checkpoint, tuned: Checkpoint) -> None:
    """Raise CheckpointError unless both hold the same parameters in the same shapes."""
    missing = sorted(base.tensors.keys() - tuned.tensors.keys())
    extra = sorted(tuned.tensors.keys() - base.tensors.keys())
    if missing or extra:
        faults = [f"{what} {_some(names)}" for what, names in (("lacks", missing), ("adds", extra)) if names]
        raise CheckpointError(
            f"the fine-tune {' and '.join(faults)}: it is no full fine-tune of this base "
            "(both folders must come from the same architecture; an adapter's has an adapter_config.json)",
            param=(missing or extra)[0],
        )
    for name, tensor in base.tensors.items():
        ours, theirs = tensor.shape, tuned.tensors[name].shape
        if ours == theirs:
            continue
        if len(ours) == len(theirs) == 2 and ours[1] == theirs[1] and _is_vocabulary(name):
            raise CheckpointError(
                f"the fine-tune resized the vocabulary: {name} has {theirs[0]} rows, the base {ours[0]}; fine-tune "
                "without adding tokens, or resize the base the same way and serve that one",
                param=name,
            )
        raise CheckpointError(
            f"tensor {name} has the shape {list(theirs)} in the fine-tune and {list(ours)} in the base: "
            "they are not the same architecture",
            param=name,
        )


def _is_vocabulary(name: str) -> bool:
    return any(word in name for word in ("embed", "wte", "lm_head"))


def _some(names: list[str]) -> str:
    rest = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + rest
