"""Products with a base in four or eight bits on CPUs: `integers.cpp`, called from Python, and its layouts."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch.nn import functional

from server.engine.kernels import build
from server.engine.kernels.build import BuildError

GROUP = 32
"""Neighbours in a row that share scale and offset in four bits."""
ABREAST = 16
"""Weight rows that lie side by side."""
_PLACES = [0, 4, 1, 5, 2, 6, 3, 7]
"""Of eight neighbours, those in the low halves of four bytes, and then those in the high ones."""
_SWAPPED = [0, 2, 1, 3]


class IntegerKernels:
    """Rows of bfloat16 against integers, summed in float32; the layouts are those of the `pack` functions below.

    Raises:
        BuildError: the library cannot be built here, or computes wrongly.
    """

    def __init__(self, cache_dir: Path, *, flags: tuple[str, ...] = ()) -> None:
        library = build.load(cache_dir, flags=flags)
        pointer, size = ctypes.c_void_p, ctypes.c_int64
        self._four, self._eight = library.switchyard_multiply_four, library.switchyard_multiply_eight
        for function in (self._four, self._eight):
            function.restype = None
            function.argtypes = (pointer, pointer, size, size, pointer, size, pointer, ctypes.c_int)
        if not self._computes_rightly():
            raise BuildError("what the compiler made computes wrongly on this machine")

    def multiply_four(self, x: torch.Tensor, nibbles: torch.Tensor, scales: torch.Tensor, out: int) -> torch.Tensor:
        """`x @ weight.T`.

        Args:
            x: `[rows, in]` bfloat16, contiguous.
            nibbles, scales: of `pack_four`.

        Returns:
            `[rows, out]` float32.
        """
        width, blocks = nibbles.shape[1] * GROUP, (out + ABREAST - 1) // ABREAST
        if nibbles.shape != (blocks, width // GROUP, 4, ABREAST, 4) or scales.shape != (*nibbles.shape[:2], ABREAST, 2):
            raise ValueError(f"nibbles {tuple(nibbles.shape)} and scales {tuple(scales.shape)} are not {out} rows")
        return self._multiply(self._four, x, nibbles, scales, (out, width))

    def multiply_eight(self, x: torch.Tensor, levels: torch.Tensor, scales: torch.Tensor, out: int) -> torch.Tensor:
        """The same for `pack_eight`."""
        width, blocks = levels.shape[1] * 4, (out + ABREAST - 1) // ABREAST
        if levels.shape != (blocks, width // 4, ABREAST, 4) or width % 8 or scales.shape != (blocks * ABREAST,):
            raise ValueError(f"levels {tuple(levels.shape)} and scales {tuple(scales.shape)} are not {out} rows")
        return self._multiply(self._eight, x, levels, scales, (out, width))

    def _multiply(
        self,
        function: ctypes._NamedFuncPointer,
        x: torch.Tensor,
        integers: torch.Tensor,
        scales: torch.Tensor,
        shape: tuple[int, int],
    ) -> torch.Tensor:
        if x.dtype is not torch.bfloat16 or x.ndim != 2 or x.shape[1] != shape[1]:
            raise ValueError(f"x must be [rows, {shape[1]}] of bfloat16, not {tuple(x.shape)} of {x.dtype}")
        x = x.contiguous()
        if not (integers.is_contiguous() and scales.is_contiguous() and scales.dtype is torch.bfloat16):
            raise ValueError("packed weights must be contiguous, with scales in bfloat16")
        y = torch.empty(len(x), shape[0])
        where = (integers.data_ptr(), scales.data_ptr(), *shape, x.data_ptr(), len(x), y.data_ptr())
        function(*where, torch.get_num_threads())
        return y

    def _computes_rightly(self) -> bool:
        """A small case, with more rows than are computed at once and weight rows that fill no vector."""
        generator = torch.Generator().manual_seed(0)
        rows, out, width = 11, 2 * ABREAST + 3, 3 * GROUP
        x = torch.randn(rows, width, generator=generator).bfloat16()
        four = torch.randint(0, 16, (out, width), generator=generator, dtype=torch.uint8)
        groups = torch.randn(width // GROUP, out, 2, generator=generator).bfloat16()
        eight = torch.randint(-127, 128, (out, width), generator=generator, dtype=torch.int8)
        scales = torch.randn(out, generator=generator).bfloat16()
        cases = (
            (self.multiply_four(x, *pack_four(four, groups), out), weight_of_four(four, groups)),
            (self.multiply_eight(x, *pack_eight(eight, scales), out), eight.float() * scales.float()[:, None]),
        )
        return all(torch.allclose(y, x.float() @ weight.T, rtol=1e-4, atol=1e-2) for y, weight in cases)


def pack_four(levels: torch.Tensor, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Levels and scales as `multiply_four` reads them; see integers.hpp.

    Args:
        levels: `[out, in]` uint8, 0 to 15; `in` a multiple of `GROUP`.
        scales: `[in / GROUP, out, 2]` bfloat16, scale and offset: `weight = (level − 8) · scale + offset`.

    Returns:
        `[⌈out / 16⌉, in / GROUP, 4, 16, 4]` uint8 and `[⌈out / 16⌉, in / GROUP, 16, 2]` bfloat16. Rows beyond the last
        are zeros.
    """
    out, width = levels.shape
    more = -out % ABREAST
    parts = functional.pad(levels, (0, 0, 0, more)).view(-1, ABREAST, width // GROUP, 4, 8).permute(0, 2, 3, 1, 4)
    low, high = parts[..., _PLACES].chunk(2, dim=-1)
    groups = functional.pad(scales, (0, 0, 0, more)).view(width // GROUP, -1, ABREAST, 2).transpose(0, 1)
    return (low | high << 4).contiguous(), groups.contiguous()


def unpack_four(nibbles: torch.Tensor, scales: torch.Tensor, out: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Undo `pack_four`; gives fresh levels."""
    blocks, groups = nibbles.shape[:2]
    levels = torch.empty(blocks, ABREAST, groups, 4, 8, dtype=torch.uint8, device=nibbles.device)
    parts = levels.permute(0, 2, 3, 1, 4)
    for byte in range(4):
        torch.bitwise_and(nibbles[..., byte], 15, out=parts[..., _PLACES[byte]])
        torch.bitwise_right_shift(nibbles[..., byte], 4, out=parts[..., _PLACES[4 + byte]])
    return levels.view(blocks * ABREAST, -1)[:out], scales.transpose(0, 1).reshape(groups, -1, 2)[:, :out]


def pack_eight(levels: torch.Tensor, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Levels and scales as `multiply_eight` reads them; see integers.hpp.

    Args:
        levels: `[out, in]` int8, −127 to 127; `in` a multiple of 8.
        scales: `[out]` bfloat16.

    Returns:
        `[⌈out / 16⌉, in / 4, 16, 4]` int8 and `[16 · ⌈out / 16⌉]` bfloat16. Rows beyond the last are zeros.
    """
    more = -len(levels) % ABREAST
    parts = functional.pad(levels, (0, 0, 0, more)).view(-1, ABREAST, levels.shape[1] // 4, 4).transpose(1, 2)
    return parts[..., _SWAPPED].contiguous(), functional.pad(scales, (0, more))


def unpack_eight(levels: torch.Tensor, scales: torch.Tensor, out: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Undo `pack_eight`; gives fresh levels."""
    blocks, fours = levels.shape[:2]
    parts = levels[..., _SWAPPED].transpose(1, 2)
    return parts.reshape(blocks * ABREAST, 4 * fours)[:out], scales[:out]


def weight_of_four(levels: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """What the arguments of `pack_four` mean, `[out, in]` float32."""
    scale, offset = scales.float().transpose(0, 1).unbind(dim=2)
    groups = levels.view(len(levels), -1, GROUP).float() - 8
    return (groups * scale[..., None] + offset[..., None]).view(levels.shape)
