"""What every codec offers."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from store.encodings import as_indices, encode_smallest
from store.errors import CheckpointError
from store.packed import PackedTensor, PackedTernary

if TYPE_CHECKING:
    import torch


class CodecName(StrEnum):
    """The methods `compress` offers."""

    T_SWITCH = "t-switch"
    FLEX_SWITCH = "flex-switch"
    COMPEFT = "compeft"
    BIT_DELTA = "bit-delta"
    LOW_RANK = "low-rank"
    RAW = "raw"
    OVERWRITE = "overwrite"


class Loss(StrEnum):
    """What `flex-switch` learns by; `store.objective` has the formulas."""

    KL = "kl"
    MSE = "mse"
    CKA = "cka"


class Codec(Protocol):
    """A way to compress one tensor. Decoding is `PackedTensor.decode`, exact size is `PackedTensor.nbytes`."""

    @property
    def name(self) -> str: ...

    def compress(self, tensor: str, delta: torch.Tensor) -> PackedTensor | None:
        """Compress a delta.

        Args:
            tensor: its name, for messages.
            delta: floating point (float32, bfloat16 or float16), any shape, any device.

        Returns:
            The packed tensor, or None where nothing is left to store (empty, all zero, or all trimmed away).

        Raises:
            CheckpointError: the delta holds NaN or infinite values, or its scale leaves float32; `param` is the tensor.
        """
        ...


def flat_float32(tensor: str, delta: torch.Tensor) -> npt.NDArray[np.float32]:
    """A delta as a flat float32 array in host memory, `[numel]`, checked to be finite.

    Raises:
        CheckpointError: it holds NaN or infinite values.
    """
    values: npt.NDArray[np.float32] = delta.detach().float().cpu().contiguous().view(-1).numpy()
    # The sum of a finite array is finite in float64; of one with NaN or infinity it never is. No mask is allocated.
    if not np.isfinite(np.sum(values, dtype=np.float64)):
        raise CheckpointError(
            f"tensor {tensor} differs from the base by NaN or infinite values: the fine-tuned checkpoint is broken",
            param=tensor,
        )
    return values


def ternary(
    tensor: str,
    shape: tuple[int, ...],
    indices: npt.NDArray[np.int64],
    positive: npt.NDArray[np.bool_],
    scale: float,
) -> PackedTernary:
    """A tensor that is +scale or −scale at `indices` (at least one, ascending), as `positive` says.

    Raises:
        CheckpointError: the scale leaves float32.
    """
    rounded = np.float32(min(scale, float(np.finfo(np.float32).max)))
    if not rounded > 0 or scale > float(np.finfo(np.float32).max):
        raise CheckpointError(f"tensor {tensor} has a delta too large or small for a float32 scale", param=tensor)
    numel = int(np.prod(shape, dtype=np.int64))
    encoded = encode_smallest(as_indices(indices, numel), np.where(positive, 1, -1).astype(np.int8), numel)
    return PackedTernary(shape, len(indices), float(rounded), encoded)
