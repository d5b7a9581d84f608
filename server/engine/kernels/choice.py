"""Which implementation of the kernels runs."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

import torch

from server.engine.kernels.build import BuildError, own_folder
from server.engine.kernels.cpu import CpuKernels
from server.engine.kernels.integers import IntegerKernels
from server.engine.kernels.reference import ReferenceKernels
from server.engine.kernels.trial import computes_rightly
from server.engine.kernels.types import Kernels
from store.errors import InvalidRequestError

log = logging.getLogger(__name__)

_Maker = Callable[[torch.device, Path | None], Kernels | str]
"""Makes an implementation for a device, or says why there is none."""


def _cpu(device: torch.device, cache_dir: Path | None) -> Kernels | str:
    if device.type != "cpu":
        return f"the device is {device.type}"
    try:
        return CpuKernels(cache_dir or Path(own_folder().name))
    except (BuildError, OSError) as error:
        return str(error)


def _triton(device: torch.device, cache_dir: Path | None) -> Kernels | str:
    if device.type != "cuda" and not (device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        return f"the device is {device.type}"
    try:
        from server.engine.kernels.gpu import TritonKernels
        from server.engine.kernels.gpu_cuda import cuda_kernels
    except ImportError:
        return "triton is not installed"
    if cache_dir is not None and device.type == "cuda":
        # Read whenever something is compiled. What an operator has chosen stays.
        os.environ.setdefault("TRITON_CACHE_DIR", str(cache_dir / "triton"))
    if device.type == "cuda":
        kernels = TritonKernels(cuda_kernels())
        if not (why := _fault(kernels, device)):
            return kernels
        log.warning("lists and merging are left to triton, which is slower at them: CUDA C++ %s", why)
    kernels = TritonKernels()
    why = _fault(kernels, device)
    return f"triton {why}" if why else kernels


def _fault(kernels: Kernels, device: torch.device) -> str | None:
    """What keeps kernels from being used."""
    try:
        is_right = computes_rightly(kernels, torch.bfloat16, device)
    except Exception as error:  # a compiler and a driver are in play: anything may be missing
        return f"does not run here: {type(error).__name__}: {error}"
    return None if is_right else "computes wrongly on this machine"


_MAKERS: dict[str, _Maker] = {
    "cpu": _cpu,
    "triton": _triton,
    "reference": lambda _device, _cache_dir: ReferenceKernels(),
}
"""By name, the fastest first."""

NAMES = ("auto", *_MAKERS)


def backend(name: str, device: torch.device, cache_dir: Path | None = None) -> Kernels:
    """The implementation of that name; with "auto", the fastest that runs on the device.

    Args:
        cache_dir: where compiled kernels are kept for the next start; None compiles them anew in every process.

    Raises:
        InvalidRequestError: there is no such implementation, or it cannot run here; says why.
    """
    if name not in NAMES:
        raise InvalidRequestError(f"kernels must be {', '.join(NAMES)}; not {name}", param="kernels")
    passed_over: list[str] = []
    # Triton's interpreter is for tests: it is taken by name only.
    candidates = [n for n in _MAKERS if n == name or (name == "auto" and (n != "triton" or device.type == "cuda"))]
    for candidate in candidates:
        make = _MAKERS[candidate]
        made = make(device, cache_dir)
        if not isinstance(made, str):
            reasons = "".join(f"; not {reason}" for reason in passed_over)
            # Whoever did not ask for the slowest should know why they have it.
            level = logging.WARNING if made.name == "reference" and name == "auto" else logging.INFO
            log.log(level, "kernels: %s on %s%s", made.name, device, reasons)
            return made
        passed_over.append(f"{candidate}: {made}")
    raise InvalidRequestError(f"the kernels cannot be used here: {passed_over[0]}", param="kernels")


def integer_kernels(cache_dir: Path | None = None) -> IntegerKernels | None:
    """Products with a base in four or eight bits on a CPU; None, and a word in the log, where they cannot be had."""
    try:
        return IntegerKernels(cache_dir or Path(own_folder().name))
    except (BuildError, OSError) as error:
        log.info("products with integers: PyTorch's own; not native: %s", error)
        return None


def available(device: torch.device, cache_dir: Path | None = None) -> dict[str, str | None]:
    """For each implementation, why it cannot run on the device, or None if it can."""
    found = {}
    for name, make in _MAKERS.items():
        made = make(device, cache_dir)
        found[name] = made if isinstance(made, str) else None
    return found
