"""Triton kernels for what lies between the matrix products of a decoder layer: one launch each, with the rounding steps
that the same sequence of PyTorch's operations has.

With few rows a step's time is its number of launches, and a norm written out in PyTorch is eight of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from server.engine.kernels.gpu_rounding import INTERPRETED, rounded

DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
_WIDEST = 16384
"""Numbers of a row that the registers of one block hold."""
_MOST_INNER = 65535
"""The size of a grid's second axis."""
_HEADS = 4
"""Heads that one block of `rotate_heads` turns."""
_NUMBERS = 1024
"""That one block of `gate_numbers` makes."""
_UNFUSED: dict[str, Any] = {} if INTERPRETED.value else {"enable_fp_fusion": False}
"""Fused multiply-adds round once where PyTorch's separate operations round twice."""


@dataclass(frozen=True)
class NormForm:
    """What an RMSNorm does with x / rms(x), a float32, and its weight.

    Attributes:
        late: it is multiplied in float32 and rounded after that; else it is rounded, multiplied and rounded again.
        plus_one: the factor is 1 + weight.
    """

    late: bool
    plus_one: bool


NORM_FORMS = (
    NormForm(late=False, plus_one=False),
    NormForm(late=True, plus_one=True),
    NormForm(late=True, plus_one=False),
)
"""Llama's, which most others share; Gemma's; OLMo 2's."""


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def norm_rows(  # type: ignore[no-untyped-def]
    y_ptr, x_ptr, weight_ptr, y_outer, y_inner, x_outer, x_inner, weight_outer, weight_inner, width, share, eps,
    LATE: tl.constexpr, PLUS_ONE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: y = x / √(mean(x²) + eps) · weight. Grid: the rows, as two axes with strides of their own.

    Args:
        share: 1 / width.
    """
    outer, inner = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    x = tl.load(x_ptr + outer * x_outer + inner * x_inner + columns, mask=inside, other=0.0).to(tl.float32)
    here = weight_ptr + outer * weight_outer + inner * weight_inner + columns
    weight = tl.load(here, mask=inside, other=0.0).to(tl.float32)
    made = x * tl.rsqrt(tl.sum(x * x, axis=0) * share + eps)
    if PLUS_ONE:
        weight = 1.0 + weight
    if not LATE:
        made = rounded(made, y_ptr.dtype.element_ty).to(tl.float32)
    made = rounded(made * weight, y_ptr.dtype.element_ty)
    tl.store(y_ptr + outer * y_outer + inner * y_inner + columns, made, mask=inside)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _turn(  # type: ignore[no-untyped-def]
    y, x, y_head, x_head, first, heads, cos, sin, half, HEADS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """HEADS heads of one row; pointers are to the row's first head, and to the row's cosines and sines."""
    dtype: tl.constexpr = y.dtype.element_ty
    column = tl.arange(0, BLOCK)
    inside = column < 2 * half
    head = first + tl.arange(0, HEADS)
    mask = (head < heads)[:, None] & inside[None, :]
    cosine = tl.load(cos + column, mask=inside, other=0.0).to(tl.float32)
    sine = tl.load(sin + column, mask=inside, other=0.0).to(tl.float32)
    sine = tl.where(column < half, -sine, sine)
    rows = x + head.to(tl.int64)[:, None] * x_head
    own = tl.load(rows + column[None, :], mask=mask, other=0.0).to(tl.float32)
    # The other half, which the cache has by now.
    partner = tl.where(column < half, column + half, column - half)
    other = tl.load(rows + partner[None, :], mask=mask, other=0.0).to(tl.float32)
    along, across = rounded(own * cosine[None, :], dtype), rounded(other * sine[None, :], dtype)
    turned = rounded(along.to(tl.float32) + across.to(tl.float32), dtype)
    tl.store(y + head.to(tl.int64)[:, None] * y_head + column[None, :], turned, mask=mask)


@triton.jit(do_not_specialize=["q_heads", "k_heads"])  # type: ignore[untyped-decorator, unused-ignore]
def rotate_heads(  # type: ignore[no-untyped-def]
    q_made_ptr, k_made_ptr, q_ptr, k_ptr, cos_ptr, sin_ptr, q_made_head, q_made_row, k_made_head, k_made_row,
    q_head, q_row, k_head, k_row, cos_row, sin_row, q_heads, k_heads, half, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """q cos + rotate_half(q) sin, and the same of k. Grid: rows, tiles of the heads of q and then of those of k."""
    row = tl.program_id(0).to(tl.int64)
    cos, sin = cos_ptr + row * cos_row, sin_ptr + row * sin_row
    tiles = tl.cdiv(q_heads, HEADS)
    if tl.program_id(1) < tiles:
        first = tl.program_id(1) * HEADS
        y, x = q_made_ptr + row * q_made_row, q_ptr + row * q_row
        _turn(y, x, q_made_head, q_head, first, q_heads, cos, sin, half, HEADS, BLOCK)
    else:
        first = (tl.program_id(1) - tiles) * HEADS
        y, x = k_made_ptr + row * k_made_row, k_ptr + row * k_row
        _turn(y, x, k_made_head, k_head, first, k_heads, cos, sin, half, HEADS, BLOCK)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def gate_numbers(y_ptr, gate_ptr, up_ptr, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """y = silu(gate) · up, BLOCK numbers of it."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    gate = tl.load(gate_ptr + place, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + place, mask=inside, other=0.0).to(tl.float32)
    gate = rounded(gate / (1.0 + tl.exp(-gate)), y_ptr.dtype.element_ty).to(tl.float32)
    tl.store(y_ptr + place, rounded(gate * up, y_ptr.dtype.element_ty), mask=inside)


def can_norm(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether `rms_norm` can be had of these."""
    long = [size for size in x.shape[:-1] if size != 1]
    return (
        _plain(x, weight)
        and 0 < x.shape[-1] == weight.shape[-1] <= _WIDEST
        and len(long) <= 2
        and (not long or long[-1] <= _MOST_INNER)
        and weight.ndim <= x.ndim
        and all(own in (1, size) for own, size in zip(reversed(weight.shape), reversed(x.shape), strict=False))
    )


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, form: NormForm) -> torch.Tensor:
    """x / √(mean(x²) + eps) · weight over the last axis (Zhang and Sennrich 2019), in float32, rounded as `form` says.

    Args:
        x: `[..., width]`, at most two of whose other axes are longer than one.
        weight: `[width]`, or with any axes that broadcast against those of x; of its dtype.

    Returns:
        Of x's shape, dtype and order of axes in memory.
    """
    y = torch.empty_like(x)
    if y.numel():
        norm_into(y, x, weight.expand_as(x), eps, form)
    return y


def norm_into(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float, form: NormForm) -> None:
    """`rms_norm` of tensors of one shape, not empty."""
    width = x.shape[-1]
    axes = [axis for axis, size in enumerate(x.shape[:-1]) if size != 1]
    sizes = [1] * (2 - len(axes)) + [x.shape[axis] for axis in axes]
    strides = [s for t in (y, x, weight) for s in ([0] * (2 - len(axes)) + [t.stride(axis) for axis in axes])]
    block = triton.next_power_of_2(width)
    norm_rows[(sizes[0], sizes[1])](
        *(y, x, weight, *strides, width, 1.0 / width, eps),
        LATE=form.late,
        PLUS_ONE=form.plus_one,
        BLOCK=block,
        num_warps=min(max(block // 512, 1), 16),
        **_UNFUSED,
    )


def can_rotate(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> bool:
    """Whether `rotate` can be had of these."""
    return (
        _plain(q, k, cos, sin)
        and q.ndim == k.ndim == 4
        and q.shape[0] == k.shape[0] == 1
        and q.shape[2:] == k.shape[2:]
        and cos.shape == sin.shape == (1, *q.shape[2:])
        and q.shape[3] % 2 == 0 < q.shape[3]
        and min(q.shape[1], k.shape[1]) > 0
    )


def rotate(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotary position embedding (Su et al. 2021) of the halves of each head: x cos + rotate_half(x) sin.

    Each product and the sum are rounded to the dtype.

    Args:
        q, k: `[1, heads, rows, head_dim]` in any order of the first three axes in memory.
        cos, sin: `[1, rows, head_dim]`.

    Returns:
        q and k, turned, each in its order of axes in memory.
    """
    made = torch.empty_like(q), torch.empty_like(k)
    if q.numel():
        rotate_into(*made, q, k, cos, sin)
    return made


def rotate_into(
    q_made: torch.Tensor, k_made: torch.Tensor, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> None:
    """`rotate`, of some rows."""
    rows, half = q.shape[2], q.shape[3] // 2
    strides = [_stride(x, axis) for x in (q_made, k_made, q, k) for axis in (1, 2)]
    tiles = -(-q.shape[1] // _HEADS) - (-k.shape[1] // _HEADS)
    rotate_heads[(rows, tiles)](
        *(q_made, k_made, q, k, cos, sin, *strides, _stride(cos, 1), _stride(sin, 1), q.shape[1], k.shape[1], half),
        HEADS=_HEADS,
        BLOCK=triton.next_power_of_2(2 * half),
        num_warps=1,
        **_UNFUSED,
    )


def can_gate(gate: torch.Tensor, up: torch.Tensor) -> bool:
    """Whether `gated` can be had of these."""
    return _plain(gate, up) and gate.shape == up.shape and gate.is_contiguous() and up.is_contiguous()


def gated(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) · up (Shazeer 2020), number by number; silu(gate) is rounded to the dtype as well."""
    y = torch.empty_like(gate)
    if y.numel():
        gate_into(y, gate, up)
    return y


def gate_into(y: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> None:
    """`gated`, of some numbers."""
    gate_numbers[(triton.cdiv(y.numel(), _NUMBERS),)](y, gate, up, y.numel(), BLOCK=_NUMBERS, **_UNFUSED)


def _stride(x: torch.Tensor, axis: int) -> int:
    """Zero where there is nothing to step over: odd numbers would need a kernel of their own."""
    return x.stride(axis) if x.shape[axis] != 1 else 0


def _plain(*tensors: torch.Tensor) -> bool:
    """Whether kernels can read them: of one dtype, on one device, their last axis in order, none with a history."""
    first = tensors[0]
    is_at_hand = first.is_cuda or (INTERPRETED.value and first.device.type == "cpu")
    return (
        is_at_hand
        and first.dtype in DTYPES
        and all(
            x.dtype is first.dtype and x.device == first.device and x.ndim and (x.stride(-1) == 1 or x.shape[-1] == 1)
            for x in tensors
        )
        and not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors))
    )
