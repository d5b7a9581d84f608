"""Which implementation of the kernels runs."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from server.engine.kernels.reference import ReferenceKernels
from server.engine.kernels.types import Kernels
from store.errors import InvalidRequestError

log = logging.getLogger(__name__)

_Maker = Callable[[torch.device], Kernels | str]
"""Makes an implementation for a device, or says why there is none."""


_MAKERS: dict[str, _Maker] = {"reference": lambda _device: ReferenceKernels()}
"""By name, the fastest first."""

NAMES = ("auto", *_MAKERS)


def backend(name: str, device: torch.device) -> Kernels:
    """The implementation of that name; with "auto", the fastest that runs on the device.

    Raises:
        InvalidRequestError: there is no such implementation, or it cannot run here; says why.
    """
    if name not in NAMES:
        raise InvalidRequestError(f"kernels must be {', '.join(NAMES)}; not {name}", param="kernels")
    passed_over: list[str] = []
    for candidate, make in _MAKERS.items():
        if name not in ("auto", candidate):
            continue
        made = make(device)
        if not isinstance(made, str):
            reasons = "".join(f"; not {reason}" for reason in passed_over)
            log.info("kernels: %s on %s%s", made.name, device, reasons)
            return made
        passed_over.append(f"{candidate}: {made}")
    raise InvalidRequestError(f"the kernels cannot be used here: {passed_over[0]}", param="kernels")


def available(device: torch.device) -> dict[str, str | None]:
    """For each implementation, why it cannot run on the device, or None if it can."""
    found = {}
    for name, make in _MAKERS.items():
        made = make(device)
        found[name] = made if isinstance(made, str) else None
    return found
