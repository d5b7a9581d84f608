"""Kernels in CUDA C++ on the CPU, for tests where there is no GPU: compiled for it, and run by `emulation.hpp`."""

from __future__ import annotations

import ctypes
import hashlib
from pathlib import Path

import torch

from server.engine.kernels.build import load
from server.engine.kernels.gpu_cuda import SOURCES, TYPES

HERE = Path(__file__).parent


class EmulatedModule:
    """`CudaModule` as far as `CudaKernels` asks for it.

    Attributes:
        launched: the names of kernels, in the order of their launches.
    """

    processors = 2

    def __init__(self, folder: Path, dtype: torch.dtype, shared: int) -> None:
        """Args:
        shared: bytes of a block.

        Raises:
            BuildError: there is no compiler, or it takes no `_Float16`.
        """
        self.shared_per_block = self.shared_per_processor = shared
        self.launched: list[str] = []
        # What the kernels are made from must be a part of the name that the library is found by.
        made_from = b"".join(path.read_bytes() for path in (*SOURCES, HERE / "emulation.hpp"))
        digest = hashlib.sha256(made_from).hexdigest()[:16]
        given = f"-I{SOURCES[0].parent}", f"-DTYPE={TYPES[dtype]}", f"-DDIGEST={digest}"
        flags = (*given, "-std=c++20", "-Wno-unknown-pragmas", "-Wno-unused", "-ffp-contract=off")
        self._library = load(folder, flags=flags, sources=(HERE / "emulated.cpp",))

    def launch(
        self, name: str, grid: tuple[int, int, int], threads: int, shared: int, *given: torch.Tensor | int
    ) -> None:
        self.launched.append(name)
        emulate = self._library.emulate_merge if name.startswith("merge") else self._library.emulate_add
        kernel = ctypes.cast(getattr(self._library, name), ctypes.c_void_p)
        pointers = [ctypes.c_void_p(one.data_ptr()) if isinstance(one, torch.Tensor) else one for one in given]
        emulate(kernel, *grid, threads, shared, *pointers)
