"""From an overwriting tensor and the base's own weights to the fine-tune's. NumPy only; no torch."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from store.checkpoint import Checkpoint, CheckpointTensor
from store.codecs.overwrite import values_digest
from store.deltas import Delta, DenseDelta, OverwriteDelta, SparseDelta
from store.errors import CheckpointError, ExpertFileError
from store.patterns import Half, Patterns, exact_patterns, patterns_of, widen


def check_sixteen_bits(base: Checkpoint, half: Half) -> None:
    """Whether a base's weights are all of one 16-bit type: only then is what stays as it was the fine-tune's.

    A float32 base has the fingerprint of its bfloat16 copy, and an expert made from that copy fits both. Reads all
    weights that are kept in another type.

    Raises:
        ExpertFileError: they are not; `param` is the tensor.
    """
    for name, tensor in base.tensors.items():
        if tensor.dtype != half and exact_patterns(tensor.read().reshape(-1), tensor.dtype, half) is None:
            raise ExpertFileError(
                f"the expert overwrites {half} weights, and tensor {name} of the base here holds finer ones "
                f"({tensor.dtype}), which its fine-tune does not have: serve the base in {half}",
                param=name,
                code="base_too_fine",
            )


def new_patterns(delta: OverwriteDelta, base: CheckpointTensor, tensor: str) -> Patterns:
    """The new bit patterns at `delta.indices`, `[nnz]`, known to be the fine-tune's own by their digest.

    Raises:
        ExpertFileError: they are not, or one is NaN or infinite; `param` is the tensor.
    """
    stored = base.read().reshape(-1)[delta.indices]
    new: Patterns = patterns_of(np.asarray(stored), base.dtype, delta.half) + delta.steps.view(np.uint16)
    if values_digest(new) != delta.sha256:
        raise ExpertFileError(
            f"tensor {tensor} does not come out as the fine-tune's: its digest differs, so the file is wrong, or the "
            f"base here is a rounded copy ({base.dtype}) of the one it was made from",
            param=tensor,
        )
    if not np.isfinite(widen(new, delta.half)).all():
        raise ExpertFileError(f"tensor {tensor} holds NaN or infinite values; create the file again", param=tensor)
    return new


def as_float_delta(delta: Delta, base: Checkpoint | None, tensor: str) -> npt.NDArray[np.float32]:
    """Any delta as what is added to the base's weights, flat, in float32; of an overwriting one that is new − old.

    Args:
        base: the base's weights; None where there are only its shapes.

    Raises:
        ExpertFileError: as `new_patterns`.
        CheckpointError: an overwriting tensor, and no base.
    """
    if isinstance(delta, DenseDelta):
        return delta.values.reshape(-1)
    values = np.zeros(int(np.prod(delta.shape, dtype=np.int64)), dtype=np.float32)
    if isinstance(delta, SparseDelta):
        values[delta.indices] = delta.levels * np.float32(delta.scale)
        return values
    if base is None:
        raise CheckpointError(f"tensor {tensor} overwrites weights: give the base's checkpoint too", param="base")
    stored = base.tensors[tensor]
    old = widen(patterns_of(np.asarray(stored.read().reshape(-1)[delta.indices]), stored.dtype, delta.half), delta.half)
    values[delta.indices] = widen(new_patterns(delta, stored, tensor), delta.half) - old
    return values
