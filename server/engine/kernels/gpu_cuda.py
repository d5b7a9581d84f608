"""What CUDA C++ is faster at than Triton: lists of nonzeros (`lists.cu`), half the time or less, and weights moved by a
delta alone (`merging.cu`), which also takes the host less to launch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch

from server.engine.kernels.cuda_module import ROOM, CudaModule
from server.engine.kernels.gpu_tables import Launch
from server.engine.kernels.types import BLOCK

SOURCES = tuple(Path(__file__).with_name(name) for name in ("numbers.cuh", "lists.cu", "merging.cu"))
TYPES = {torch.bfloat16: "Bfloat", torch.float16: "Half", torch.float32: "Float"}

_ROWS = (8, 4, 2, 1)
"""Batch rows of a pass: the more, the fewer readings of a list, and the fewer columns of x fit."""
_RESIDENT = ((4, 256), (2, 512), (1, 512))
"""Blocks that a processor runs at a time and threads of each, as many as their registers let it: the first that their
shared memory lets it, too."""
_MOST_TILE = 1024
_LEAST_THREADS = 128
_SHARERS = {1: 4, 2: 4, 4: 4, 8: 8}
"""Threads on a list, by rows of a pass."""
_WARP, _MERGING_WARPS, _PIECE_BYTES = 32, 8, 2048
_TILE_ROWS, _TILE_COLUMNS, _TILE_THREADS, _APART = 32, 256, 256, 65
"""Of planes that are merged."""


class Module(Protocol):
    """Kernels for one dtype, on a GPU or emulated; see `CudaModule`."""

    processors: int
    shared_per_block: int
    shared_per_processor: int

    def launch(
        self, name: str, grid: tuple[int, int, int], threads: int, shared: int, *given: torch.Tensor | int
    ) -> None: ...


class CudaKernels:
    """Launches by tables as `gpu_tables` has them."""

    def __init__(self, make: Callable[[torch.dtype, torch.device], Module]) -> None:
        """Args:
        make: compiles the kernels for a dtype; called once for each dtype and device.
        """
        self._make = make
        self._modules: dict[tuple[torch.dtype, torch.device], Module] = {}

    def module(self, dtype: torch.dtype, device: torch.device) -> Module:
        """Raises whatever `make` does."""
        known = self._modules.get((dtype, device))
        if known is None:
            known = self._modules[dtype, device] = self._make(dtype, device)
        return known

    def add_lists(self, y: torch.Tensor, x: torch.Tensor, launch: Launch) -> bool:
        """What `TritonKernels.add_launches` does for one launch on lists; False if x is too wide for shared memory."""
        module = self.module(y.dtype, y.device)
        x = x.to(y.dtype)  # sums of several forms are float32, whatever x is
        out, width = y.shape[1], x.shape[1]

        def shared(rows: int, tile: int) -> int:
            # x and a column of zeros, sums, starts and order, as the kernel lays them out.
            return -(-(width + 1) * rows * x.itemsize // 16) * 16 + 4 * (rows * tile + 2 * tile + 1)

        def resident(rows: int) -> int:
            return module.shared_per_processor // (shared(rows, BLOCK) + ROOM)

        # Two blocks at least, so that one adds while the other brings its x.
        rows = 1 if launch.tile == 1 else next((rows for rows in _ROWS if resident(rows) >= 2), 1)
        if shared(rows, BLOCK) + ROOM > module.shared_per_block:
            return False
        passes = -(-launch.tile // rows)
        blocks, threads = next(pair for pair in _RESIDENT if pair[0] <= max(1, resident(rows)))
        # As many blocks as run at a time, if each has enough to do.
        wanted = -(-out * launch.chunks * passes // (module.processors * blocks * BLOCK)) * BLOCK
        tile = min(max(wanted, BLOCK), _MOST_TILE)
        while shared(rows, tile) + ROOM > module.shared_per_block:
            tile -= BLOCK
        # Where there is little to do, the registers of idle threads are better left to what else runs.
        threads = min(threads, max(_LEAST_THREADS, tile * _SHARERS[rows]))
        name = f"add_{'levels' if launch.levels else 'lists'}_{rows}"
        grid = (-(-out // tile), launch.chunks, passes)
        given = (y, x, launch.table, launch.terms, out, width, tile)
        module.launch(name, grid, threads, shared(rows, tile), *given)
        return True

    def merge_lists(self, out: torch.Tensor, pristine: torch.Tensor, term: torch.Tensor, first_row: int) -> None:
        """out = pristine + weight · Δ, `[rows, width]`, which must not be the same memory.

        Args:
            term: a row of a term table, of lists.
            first_row: what its `order` calls the first of the rows.
        """
        grid = (-(-len(out) // _MERGING_WARPS), 1, 1)
        self._merge(
            "merge_lists", grid, _MERGING_WARPS * _WARP, _MERGING_WARPS * _PIECE_BYTES, out, pristine, term, first_row
        )

    def merge_planes(self, out: torch.Tensor, pristine: torch.Tensor, term: torch.Tensor) -> None:
        """The same with a term of planes of one digit."""
        grid = (-(-out.shape[1] // _TILE_COLUMNS), -(-len(out) // _TILE_ROWS), 1)
        shared = _TILE_COLUMNS // 32 * _APART * 4
        self._merge("merge_planes", grid, _TILE_THREADS, shared, out, pristine, term, 0)

    def _merge(
        self, name: str, grid: tuple[int, int, int], threads: int, shared: int, out: torch.Tensor,
        pristine: torch.Tensor, term: torch.Tensor, first_row: int,
    ) -> None:  # fmt: skip
        self.module(out.dtype, out.device).launch(
            name, grid, threads, shared, out, pristine, term, first_row, *out.shape
        )


def cuda_kernels() -> CudaKernels:
    """Of the GPUs of this machine; compiled when they are first used, for which `module` has an exception."""
    return CudaKernels(lambda dtype, device: CudaModule(SOURCES, {"TYPE": TYPES[dtype]}, device))
