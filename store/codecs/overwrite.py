"""Overwrite: which weights a fine-tune changed, and their new bit patterns; nothing is lost.

For fine-tunes that leave most weights as they were, bit by bit, as reinforcement learning in bfloat16 does (arXiv
2505.11711). A sum of floats would not come back: base + (tuned − base) ≠ tuned in general. So what is stored is the
distance of the new 16-bit pattern from the base's, counted in patterns, modulo 2¹⁶: near ones are the likeliest.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

from store.bfloat16 import from_bfloat16
from store.checkpoint import CheckpointTensor
from store.encodings import as_indices, encode_steps
from store.errors import CheckpointError
from store.packed import PackedOverwrite
from store.patterns import Half, Patterns, exact_patterns


def overwrite(tensor: str, base: CheckpointTensor, tuned: CheckpointTensor) -> PackedOverwrite | None:
    """What of one tensor changed; None where nothing did. Arguments and errors as `steps_between`."""
    half, indices, steps = steps_between(tensor, base, tuned)
    if not len(indices):
        return None
    numel = base.span.numel
    new = exact_patterns(np.asarray(tuned.read().reshape(-1)[indices]), tuned.dtype, half)
    assert new is not None
    encoded = encode_steps(as_indices(indices, numel), steps, numel)
    return PackedOverwrite(base.shape, len(indices), encoded, half, values_digest(new))


def steps_between(
    tensor: str, base: CheckpointTensor, tuned: CheckpointTensor
) -> tuple[Half, npt.NDArray[np.int64], npt.NDArray[np.int16]]:
    """Where two tensors differ in their bits, `[nnz]`, and how far the new patterns lie from the old ones, `[nnz]`.

    Args:
        tensor: their name, for messages.
        base, tuned: of one shape, in any type, holding nothing but 16-bit numbers of one kind, which is returned too.

    Raises:
        CheckpointError: the fine-tune holds NaN or infinite values, or either holds what no 16-bit type can.
    """
    before, after = base.read().reshape(-1), tuned.read().reshape(-1)
    broken = CheckpointError(
        f"tensor {tensor} of the fine-tune holds NaN or infinite values: the checkpoint is broken", param=tensor
    )
    for half in sorted(Half, key=lambda half: half != tuned.dtype):
        new = exact_patterns(after, tuned.dtype, half)
        old = None if new is None else exact_patterns(before, base.dtype, half)
        if new is not None and old is not None:
            if not _all_finite(new, half):
                raise broken
            indices = np.flatnonzero(new != old)
            return half, indices, (new[indices] - old[indices]).view(np.int16)
    values = from_bfloat16(after.astype(np.uint16)) if tuned.dtype == Half.BF16 else after
    if not np.isfinite(values.astype(np.float64)).all():
        raise broken
    raise CheckpointError(
        f"tensor {tensor} holds values that bfloat16 (or float16) cannot, in the base ({base.dtype}) or in the "
        f"fine-tune ({tuned.dtype}): overwrite keeps 16-bit weights, so save both in the same 16-bit type, or take "
        "another codec",
        param=tensor,
    )


def _all_finite(patterns: Patterns, half: Half) -> bool:
    exponent = np.uint16(0x7F80 if half is Half.BF16 else 0x7C00)
    return not bool(((patterns & exponent) == exponent).any())


def values_digest(patterns: Patterns) -> str:
    """Hex sha256 of new bit patterns, little-endian, in order of index."""
    return hashlib.sha256(patterns.astype("<u2").tobytes()).hexdigest()
