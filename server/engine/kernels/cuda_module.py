"""CUDA C++ for the GPU of this machine, compiled when it is first wanted by the compiler that comes with PyTorch."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

ROOM = 1024
"""Bytes of shared memory that the driver takes of every block."""

_CARVEOUT = 100
"""Per cent of a processor's cache that is shared memory: what large products want, too, which run before and after."""
_OLDEST = (7, 0)
"""Compute capability."""


class CudaModule:
    """The kernels of some source files, one after the other, on one device.

    Attributes:
        processors: streaming multiprocessors.
        shared_per_block, shared_per_processor: bytes of shared memory.
    """

    def __init__(self, sources: tuple[Path, ...], defines: dict[str, str], device: torch.device) -> None:
        """Raises:
        ImportError: cuda-bindings is not installed; PyTorch for CUDA brings it from 2.10 on.
        RuntimeError: the compiler or the driver does not take it; says why.
        """
        from cuda.bindings import driver

        self._driver: Any = driver
        self._index = torch.cuda.current_device() if device.index is None else device.index
        attribute, kinds = driver.cuDeviceGetAttribute, driver.CUdevice_attribute
        with torch.cuda.device(self._index):
            torch.cuda.current_stream().synchronize()  # there is a context then
            number = _of(driver.cuCtxGetDevice())

            def limit(name: str) -> int:
                return int(_of(attribute(getattr(kinds, f"CU_DEVICE_ATTRIBUTE_{name}"), number)))

            capability = limit("COMPUTE_CAPABILITY_MAJOR"), limit("COMPUTE_CAPABILITY_MINOR")
            if capability < _OLDEST:
                raise RuntimeError(f"the GPU has compute capability {capability}, wanted is {_OLDEST}")
            self.processors = limit("MULTIPROCESSOR_COUNT")
            self.shared_per_block = limit("MAX_SHARED_MEMORY_PER_BLOCK_OPTIN")
            self.shared_per_processor = limit("MAX_SHARED_MEMORY_PER_MULTIPROCESSOR")
            architecture = "sm_{}{}".format(*capability)
            self._module = _of(driver.cuModuleLoadData(compiled(sources, tuple(sorted(defines.items())), architecture)))
        self._functions: dict[str, Any] = {}

    def launch(
        self, name: str, grid: tuple[int, int, int], threads: int, shared: int, *given: torch.Tensor | int
    ) -> None:
        """Queue a kernel on its device's current stream; the device must be the thread's.

        Args:
            threads: of a block.
            shared: bytes of shared memory of a block.
            given: its arguments, tensors for pointers and numbers for ints.
        """
        types = tuple(ctypes.c_void_p if isinstance(one, torch.Tensor) else ctypes.c_int for one in given)
        values = tuple(one.data_ptr() if isinstance(one, torch.Tensor) else one for one in given)
        stream = torch.cuda.current_stream(self._index).cuda_stream
        function = self._function(name)
        _of(self._driver.cuLaunchKernel(function, *grid, threads, 1, 1, shared, stream, (values, types), 0))

    def _function(self, name: str) -> Any:
        known = self._functions.get(name)
        if known is None:
            driver = self._driver
            known = _of(driver.cuModuleGetFunction(self._module, name.encode()))
            kinds = driver.CUfunction_attribute
            for kind, value in (
                (kinds.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, self.shared_per_block),
                (kinds.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, _CARVEOUT),
            ):
                _of(driver.cuFuncSetAttribute(known, kind, value))
            self._functions[name] = known
        return known


@cache
def compiled(sources: tuple[Path, ...], defines: tuple[tuple[str, str], ...], architecture: str) -> bytes:
    """Machine code of source files, one after the other, for one architecture: `sm_90`, say.

    Raises:
        ImportError: cuda-bindings is not installed.
        RuntimeError: it does not compile; says why.
    """
    from cuda.bindings import nvrtc

    options = [f"--gpu-architecture={architecture}", "--std=c++17", *(f"-D{name}={value}" for name, value in defines)]
    text = "".join(f'#line 1 "{source.name}"\n{source.read_text(encoding="utf-8")}' for source in sources)
    program = _of(nvrtc.nvrtcCreateProgram(text.encode(), b"kernels.cu", 0, [], []))
    try:
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
        if status.value:
            said = bytearray(_of(nvrtc.nvrtcGetProgramLogSize(program)))
            nvrtc.nvrtcGetProgramLog(program, said)
            raise RuntimeError(f"{sources[-1].name} does not compile: {said.decode(errors='replace').strip(chr(0))}")
        made = bytearray(_of(nvrtc.nvrtcGetCUBINSize(program)))
        _of(nvrtc.nvrtcGetCUBIN(program, made))
        return bytes(made)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _of(result: Sequence[Any]) -> Any:
    """What a call has found; calls answer with a status before it.

    Raises:
        RuntimeError: the status is not success.
    """
    status, *found = result
    if status.value:
        raise RuntimeError(f"CUDA: {status.name}")
    return found[0] if found else None
