"""The base in eight or four bits: linear layers whose weights are integers, for mixed mode, which never changes them.

Decoding a token reads every weight once, so a quarter of the bytes is up to a quarter of the time. The products round
the activations to bfloat16 and add up in float32. They are made for few rows; for more, a layer's weights are widened
to bfloat16 for one ordinary product. Both compute with the same numbers. On CPUs the products are our own and have
formats of their own (`kernels/integers.py`); where these cannot be built, and on GPUs, they are PyTorch's.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional

from server.engine.kernels import integer_kernels
from server.engine.kernels.integers import GROUP, IntegerKernels, pack_eight, pack_four, unpack_eight, unpack_four
from server.engine.options import BaseWeights
from store.errors import InvalidRequestError

FEW = 24
"""Rows up to which PyTorch's products read the integers; widening all of them costs as much as 20 to 40 more rows."""
MANY = 512
"""Rows up to which our own do: with AVX-512 they took less time than widening and one ordinary product up to there."""
_TILE = 8
"""Rows that lie side by side in the four-bit format of GPUs."""
_BLOCKS = (64, 32)
"""Rows that lie side by side in the four-bit format: with AVX-512, and with AVX2."""


class Eight(nn.Module):
    """Symmetric, one scale per row: `weight[i, j] ≈ levels[i, j] · scales[i]`."""

    few: ClassVar[int] = FEW
    levels: torch.Tensor
    scales: torch.Tensor

    def __init__(self, weight: torch.Tensor) -> None:
        """Args:
        weight: `[out, in]`.
        """
        super().__init__()
        levels, scales = _eight_bits(weight)
        self.register_buffer("levels", levels)
        self.register_buffer("scales", scales)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        if x.is_cuda:
            # There PyTorch's product took 7 to 83 times as long as one in full (`python -m bench.gpu`, one H100).
            return functional.linear(x, self.widened())
        return torch._weight_int8pack_mm(x, self.levels, self.scales)

    def widened(self) -> torch.Tensor:
        return self.levels.bfloat16() * self.scales[:, None]


class EightAbreast(nn.Module):
    """The numbers of `Eight` as our own product on CPUs reads them."""

    few: ClassVar[int] = MANY
    levels: torch.Tensor
    scales: torch.Tensor

    def __init__(self, weight: torch.Tensor, kernels: IntegerKernels) -> None:
        super().__init__()
        self.out, self._kernels = len(weight), kernels
        levels, scales = pack_eight(*_eight_bits(weight))
        self.register_buffer("levels", levels)
        self.register_buffer("scales", scales)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        return self._kernels.multiply_eight(x, self.levels, self.scales, self.out)

    def widened(self) -> torch.Tensor:
        levels, scales = unpack_eight(self.levels, self.scales, self.out)
        return levels.bfloat16() * scales[:, None]


class Four(nn.Module):
    """Sixteen levels between the least and the largest of each `GROUP` neighbours:
    `weight[i, j] ≈ (level[i, j] − 8) · scale + offset`.

    `nibbles` are as PyTorch packs them: blocks of rows, column by column, the block's first half in the low bits.
    """

    few: ClassVar[int] = FEW
    nibbles: torch.Tensor
    scales: torch.Tensor

    def __init__(self, weight: torch.Tensor) -> None:
        """Args:
        weight: `[out, in]`, `in` a multiple of `GROUP`.
        """
        super().__init__()
        self.shape = weight.shape
        levels, scales = _four_bits(weight)
        self.register_buffer("nibbles", torch.ops.aten._convert_weight_to_int4pack_for_cpu(levels, 1))
        self.register_buffer("scales", scales)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x, self.nibbles, GROUP, self.scales)
        return y

    def widened(self) -> torch.Tensor:
        rows, columns = self.shape
        block = _four_bit_block()
        halves = self.nibbles.view(rows // block, columns, block // 2)
        levels = torch.cat([halves & 15, halves >> 4], dim=2).transpose(1, 2).reshape(rows, columns)
        return _widened(levels, self.scales)


class FourAbreast(nn.Module):
    """The numbers of `Four` as our own product on CPUs reads them."""

    few: ClassVar[int] = MANY
    nibbles: torch.Tensor
    scales: torch.Tensor

    def __init__(self, weight: torch.Tensor, kernels: IntegerKernels) -> None:
        super().__init__()
        self.out, self._kernels = len(weight), kernels
        levels, scales = _four_bits(weight)
        nibbles, scales = pack_four(levels.to(torch.uint8), scales)
        self.register_buffer("nibbles", nibbles)
        self.register_buffer("scales", scales)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        return self._kernels.multiply_four(x, self.nibbles, self.scales, self.out)

    def widened(self) -> torch.Tensor:
        return _widened(*unpack_four(self.nibbles, self.scales, self.out))


class Tiled(nn.Module):
    """The numbers of `Four` as PyTorch's product on NVIDIA GPUs reads them, Ampere or later; see `tiled`."""

    few: ClassVar[int] = FEW
    words: torch.Tensor
    scales: torch.Tensor

    def __init__(self, weight: torch.Tensor) -> None:
        """Args:
        weight: `[out, in]`, `out` a multiple of 8, `in` one of `GROUP`.
        """
        super().__init__()
        levels, scales = _four_bits(weight)
        self.register_buffer("words", tiled(levels))
        self.register_buffer("scales", scales)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = torch.ops.aten._weight_int4pack_mm(x.contiguous(), self.words, GROUP, self.scales)
        return y

    def widened(self) -> torch.Tensor:
        return _widened(untiled(self.words), self.scales)


def tiled(levels: torch.Tensor) -> torch.Tensor:
    """Levels in the order in which a warp's lanes want them: the B operand of a 16 × 8 × 16 product of tensor cores.

    A word has one row's eight levels at columns 0, 8, 16, 24 and then 1, 9, 17, 25 of 32, after twice the lane's number
    modulo four; the lane's number over four is the row within a tile of eight. Two to eight tiles of 16 columns, as
    many as fit, are side by side for one load per lane.

    Args:
        levels: `[out, in]` int32, 0 to 15; `out` a multiple of 8, `in` one of 32.

    Returns:
        `[out / 8, in / (32 · n), 32, n]` int32, n of 1, 2 or 4.
    """
    rows, columns = levels.shape
    words = next(n for n in (4, 2, 1) if columns % (32 * n) == 0)
    # tile, row, stretch, word, eight columns, lane, pair → tile, stretch, row and lane, word, pair and eight columns
    parts = levels.view(rows // _TILE, _TILE, -1, words, 4, 4, 2).permute(0, 2, 1, 5, 3, 6, 4)
    nibbles = parts.reshape(rows // _TILE, -1, 32, words, 8).to(torch.uint8)
    return (nibbles[..., ::2] | nibbles[..., 1::2] << 4).view(torch.int32).squeeze(-1)


def untiled(words: torch.Tensor) -> torch.Tensor:
    """Undo `tiled`; gives `[out, in]` uint8."""
    tiles, stretches, _, count = words.shape
    pairs = words.unsqueeze(-1).view(torch.uint8)
    parts = torch.stack([pairs & 15, pairs >> 4], dim=-1).view(tiles, stretches, _TILE, 4, count, 2, 4)
    return parts.permute(0, 2, 1, 4, 6, 3, 5).reshape(tiles * _TILE, -1)


def _eight_bits(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`[out, in]` int8 levels, and `[out]` scales in bfloat16."""
    scales = weight.float().abs().amax(dim=1).div(127).clamp(min=1e-12).bfloat16()
    return (weight.float() / scales.float()[:, None]).round_().clamp_(-127, 127).to(torch.int8), scales


def _four_bits(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`[out, in]` int32 levels, and `[in / GROUP, out, 2]` scales and offsets in bfloat16."""
    groups = weight.float().view(len(weight), -1, GROUP)
    low, high = groups.amin(dim=2), groups.amax(dim=2)
    scale = ((high - low) / 15).clamp(min=1e-12).bfloat16()
    offset = (low + 8 * scale.float()).bfloat16()
    levels = (groups - offset.float()[..., None]) / scale.float()[..., None] + 8
    levels = levels.round_().clamp_(0, 15).to(torch.int32).view(weight.shape)
    return levels, torch.stack([scale, offset], dim=2).transpose(0, 1).contiguous()


def _widened(levels: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The weight that `_four_bits` means, from fresh uint8 levels, which it changes."""
    scale, offset = scales.transpose(0, 1).unbind(dim=2)
    groups = levels.view(len(levels), -1, GROUP).sub_(8).view(torch.int8).bfloat16()
    return groups.mul_(scale[..., None]).add_(offset[..., None]).view(levels.shape)


Packed = Eight | EightAbreast | Four | FourAbreast | Tiled
Make = Callable[[torch.Tensor], Packed]


class QuantisedLinear(nn.Linear):
    """`nn.Linear` over a packed weight. Its `weight` has shape and dtype, and no memory of its own."""

    packed: Packed

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        x = input.reshape(-1, input.shape[-1]).bfloat16()
        y = self.packed.product(x) if len(x) <= self.packed.few else functional.linear(x, self.packed.widened())
        y = y.to(input.dtype).view(*input.shape[:-1], -1)
        return y if self.bias is None else y.add_(self.bias)


def quantise(network: nn.Module, kind: BaseWeights, device: torch.device, cache_dir: Path | None = None) -> None:
    """Turn the linear layers of a network into `QuantisedLinear`, in place.

    What else uses a weight, as an embedding tied to the head does, keeps it in full beside. Layers whose sizes do not
    fit the format stay as they are.

    Args:
        cache_dir: where compiled kernels are kept for the next start; None compiles them anew in every process.

    Raises:
        InvalidRequestError: this machine or this PyTorch cannot compute with such weights.
    """
    if device.type not in ("cpu", "cuda"):
        message = f"base_weights={kind} is for CPUs and NVIDIA GPUs, the device is {device.type}"
        raise InvalidRequestError(message, param="base_weights")
    form, make = format_of(kind, device, integer_kernels(cache_dir) if device.type == "cpu" else None)
    _check(make, device)
    owners: dict[int, int] = {}
    for module in network.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    for module in list(network.modules()):
        if type(module) is not nn.Linear or not fits((module.out_features, module.in_features), form):
            continue
        packed = make(module.weight.data)
        if owners[id(module.weight)] == 1:
            module.weight.data = torch.zeros((), dtype=module.weight.dtype).expand(module.weight.shape)
        module.__class__ = QuantisedLinear
        module.packed = packed


def format_of(kind: BaseWeights, device: torch.device, kernels: IntegerKernels | None) -> tuple[type[Packed], Make]:
    """What weights are kept as, with our own kernels or without, and what makes it of one."""
    if kernels is not None:
        if kind is BaseWeights.INT8:
            return EightAbreast, lambda weight: EightAbreast(weight, kernels)
        return FourAbreast, lambda weight: FourAbreast(weight, kernels)
    if kind is BaseWeights.INT8:
        return Eight, Eight
    return (Tiled, Tiled) if device.type == "cuda" else (Four, Four)


def fits(shape: tuple[int, int], form: type[Packed]) -> bool:
    """Whether a weight `[out, in]` can be kept in a format."""
    out, width = shape
    if form is Eight:
        return width % 16 == 0 and out % 4 == 0
    if form is EightAbreast:
        return width % 8 == 0
    rows = {Four: _BLOCKS[0], FourAbreast: 1, Tiled: _TILE}[form]
    return width % GROUP == 0 and out % rows == 0


def _check(make: Make, device: torch.device) -> None:
    """Compare the two ways to compute on a small case: the formats of PyTorch's products are its own affair."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 2 * GROUP, generator=generator).bfloat16().to(device)
    try:
        packed = make(torch.randn(2 * _BLOCKS[0], 2 * GROUP, generator=generator).to(device))
        given, expected = packed.product(x).float(), x.float() @ packed.widened().float().T
    except (RuntimeError, AttributeError) as error:  # NotImplementedError is a RuntimeError
        raise InvalidRequestError(f"this PyTorch has no such products: {error}", param="base_weights") from error
    if not torch.allclose(given, expected, rtol=0.02, atol=0.1):
        raise InvalidRequestError("this PyTorch packs such weights in a way unknown here", param="base_weights")


def _four_bit_block() -> int:
    return _BLOCKS[0] if torch.backends.cpu.get_cpu_capability().startswith("AVX512") else _BLOCKS[1]
