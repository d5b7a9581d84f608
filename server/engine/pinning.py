"""Page-locked host memory: what a GPU copies from at the full speed of its bus, and while it computes."""

from __future__ import annotations

import logging
from typing import Any

import torch

_log = logging.getLogger(__name__)


def pin(buffer: torch.Tensor) -> bool:
    """Lock a buffer's pages; False, and a line in the log, where the system does not allow it.

    Registered rather than allocated by torch, whose allocator rounds up to powers of two and keeps what is freed: a
    tier that is bounded in bytes must know what it holds.

    To be called on a thread that does nothing else on the GPU. It takes a good part of a second per GB; and where it
    fails, CUDA keeps the error for the thread's next call, which torch would take for the failure of an innocent
    kernel.

    Args:
        buffer: contiguous, on the CPU. It must outlive the lock.
    """
    if buffer.nbytes == 0:
        return False
    status = int(_runtime().cudaHostRegister(buffer.data_ptr(), buffer.nbytes, 0))
    if status != 0:
        _log.warning("an expert's host memory could not be page-locked (CUDA error %d): its loads are slower", status)
    return status == 0


def unpin(buffer: torch.Tensor) -> None:
    """Undo `pin`. No copy from the buffer may be under way."""
    _runtime().cudaHostUnregister(buffer.data_ptr())


def _runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]
