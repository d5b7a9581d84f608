"""Norms, gates and rotary embeddings of a loaded network as one kernel each, where these compute what its code does.

Nothing is known of an architecture but names: modules called RMSNorm, modules with a `gate_proj`, a function called
`apply_rotary_pos_emb`. Each is tried out on random numbers, on its device and in its dtype, and keeps its own code if
anything comes out otherwise.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator
from functools import cache, partial, update_wrapper
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from server.engine.sites import swapped

if TYPE_CHECKING:
    from server.engine.gpu_elementwise import NormForm

log = logging.getLogger(__name__)

_DEVICES = frozenset({"cuda"})
"""Where it is worth it. Triton's interpreter is for tests, which add the CPU."""
_ROTARY = "apply_rotary_pos_emb"
_GATED = frozenset({"gate_proj", "up_proj", "down_proj", "act_fn"})
_EPS_NAMES = ("variance_epsilon", "eps")
_ROUNDINGS = {torch.float32: 16.0, torch.bfloat16: 2.0, torch.float16: 2.0}
"""How far norms and gates may be apart, in units of the last place: sums have another order, exponentials errors."""
_FEW = 0.01
"""The share of numbers that may be apart at all, in half precision: another way to round moves one in four."""
_SCALES = (1.0, 1e-3, 30.0, 0.0)
"""Of rows, one after the other: some so small that it shows where eps is added."""

Rotary = Callable[..., tuple[torch.Tensor, torch.Tensor]]
Noise = Callable[..., torch.Tensor]


def fuse(network: nn.Module, head_dim: int, cache_dir: Path | None) -> None:
    """Give the network's norms and gates and its modeling code's rotary embedding their fused forms, for good.

    Does nothing, or only a part, where something is missing or differs; says so in the log.

    Args:
        network: on one device, in one dtype.
        head_dim: of its queries and keys.
        cache_dir: where compiled kernels are kept.
    """
    first = next(network.parameters())
    device, dtype = first.device, first.dtype
    if device.type not in _DEVICES or (device.type == "cuda" and device.index != torch.cuda.current_device()):
        return
    if cache_dir is not None and device.type == "cuda":
        # Read whenever something is compiled. What an operator has chosen stays.
        os.environ.setdefault("TRITON_CACHE_DIR", str(cache_dir / "triton"))
    norms = [module for module in network.modules() if type(module).__name__.endswith("RMSNorm")]
    mlps = [module for module in network.modules() if set(module._modules) == _GATED]
    homes = sorted({type(module).__module__ for module in network.modules()})
    failed: dict[object, str] = {}

    def tried(kind: object, attempt: Callable[[], bool]) -> bool:
        try:
            return kind not in failed and attempt()
        except Exception as error:  # a compiler and a driver are in play: anything may be missing
            failed[kind] = f"{type(error).__name__}: {error}"
            return False

    fused = sum(tried(type(module), partial(fuse_norm, module)) for module in norms)
    gated = sum(tried(type(module), partial(fuse_mlp, module, device, dtype)) for module in mlps)
    rotary = [h for h in homes if tried(h, partial(fuse_rotary, sys.modules[h], head_dim, device, dtype))]
    log.info(
        "%d of %d norms and %d of %d gates are one kernel each; rotary embeddings of %s%s",
        *(fused, len(norms), gated, len(mlps), ", ".join(rotary) or "no module"),
        "".join(f"; not {why}" for why in sorted(set(failed.values()))),
    )


def fuse_norm(module: nn.Module) -> bool:
    """Turn a norm into one of a class that computes it in one kernel, if any form of these is its own.

    Raises whatever compiling and running a kernel does.
    """
    kind: Any = type(module)
    eps = next((name for name in _EPS_NAMES if isinstance(getattr(module, name, None), float)), None)
    weight = module._parameters.get("weight")
    is_known = list(module.state_dict()) == ["weight"] and weight is not None and weight.ndim == 1
    if eps is None or not is_known or "forward" in module.__dict__ or issubclass(kind, Fused):
        return False
    form = _form_of(module, getattr(module, eps))
    if form is None:
        return False
    # As for a class of its own, and not for an attribute: mixed mode puts its own `forward` there and takes it away.
    module.__class__ = _norm_class(kind, eps, form)
    return True


class Fused:
    """Marks the classes of fused norms and gates."""


@cache
def _norm_class(kind: Any, eps: str, form: NormForm) -> type[nn.Module]:
    from server.engine.gpu_elementwise import can_norm, rms_norm

    def forward(self: nn.Module, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        weight = self._parameters["weight"]
        if args or kwargs or weight is None or not can_norm(x, weight):
            result: torch.Tensor = kind.forward(self, x, *args, **kwargs)
            return result
        return rms_norm(x, weight.data, getattr(self, eps), form)

    return type(kind.__name__, (Fused, kind), {"forward": forward, "__module__": kind.__module__})


@torch.inference_mode()
def _form_of(module: nn.Module, eps: float) -> NormForm | None:
    """The form that computes what a norm does, with any weights, one for all rows or one for each."""
    from server.engine.gpu_elementwise import NORM_FORMS, can_norm, rms_norm

    parameter = module.get_parameter("weight")
    left = list(NORM_FORMS)
    for x, weight in _norm_cases(parameter.shape[0], _noise(parameter.device, parameter.dtype)):
        if not can_norm(x, weight):
            return None
        with swapped({"weight": parameter}, {"weight": weight}):
            expected = module(x)
        left = [form for form in left if _agree(rms_norm(x, weight, eps, form), expected)]
    return left[0] if left else None


def _norm_cases(width: int, noise: Noise) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Inputs as layers and heads have them, and weights."""
    rows = noise(1, 8, width)
    rows *= rows.new_tensor(_SCALES * 2)[:, None]
    heads = noise(1, 3, 2, width).transpose(1, 2)
    for x in (rows[:, :1], rows, noise(1, 5, 2 * width)[:, ::2, :width], rows[:, :0]):
        for weight in (noise(width), noise(x.shape[1], width)):
            yield x, weight
    for weight in (noise(width), noise(3, width), noise(2, 1, width)):
        yield heads, weight


def _agree(got: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether two results are the same up to one rounding of what is multiplied, in few places."""
    if got.shape != expected.shape or got.dtype != expected.dtype or _order(got) != _order(expected):
        return False
    limits, steps = torch.finfo(expected.dtype), _ROUNDINGS[expected.dtype]
    rtol, atol = steps * limits.eps, steps * limits.smallest_normal * limits.eps
    is_close = torch.allclose(got.double(), expected.double(), rtol=rtol, atol=atol)
    apart = int((got != expected).sum())
    return is_close and (expected.dtype is torch.float32 or apart <= max(1.0, _FEW * expected.numel()))


def _order(x: torch.Tensor) -> list[int]:
    """Its strides, where there is something to step over."""
    return [stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]


def fuse_mlp(module: nn.Module, device: torch.device, dtype: torch.dtype) -> bool:
    """Turn a gated layer into one of a class that computes silu(gate) · up in one kernel, if that is what it does.

    Raises whatever compiling and running a kernel does.
    """
    kind: Any = type(module)
    if set(module._modules) != _GATED or "forward" in module.__dict__ or issubclass(kind, Fused):
        return False
    if not _is_gated(module, device, dtype):
        return False
    module.__class__ = _mlp_class(kind)
    return True


@cache
def _mlp_class(kind: Any) -> type[nn.Module]:
    from server.engine.gpu_elementwise import can_gate, gated

    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return kind.forward(self, x, *args, **kwargs)
        gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(gated(gate, up) if can_gate(gate, up) else self.act_fn(gate) * up)

    return type(kind.__name__, (Fused, kind), {"forward": forward, "__module__": kind.__module__})


class _Given(nn.Module):
    """Stands for a projection: answers with what it was made with, and keeps what it was asked."""

    def __init__(self, answer: torch.Tensor) -> None:
        super().__init__()
        self.answer = answer
        self.asked: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.asked.append(x)
        return self.answer


@torch.inference_mode()
def _is_gated(module: nn.Module, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a layer is down(silu(gate(x)) · up(x)) and nothing else, whatever its projections make of x."""
    from server.engine.gpu_elementwise import can_gate, gated

    noise = _noise(device, dtype)
    for rows in (1, 3):
        x, gate, up = noise(1, rows, 8), 5 * noise(1, rows, 1000), 5 * noise(1, rows, 1000)
        own = dict(module._modules)
        gates, ups, downs = (_Given(answer) for answer in (gate, up, noise(1, rows, 8)))
        module._modules.update(gate_proj=gates, up_proj=ups, down_proj=downs)
        try:
            made = module(x)
        finally:
            module._modules.update(own)
        asked = [seen[0] if len(seen) == 1 else None for seen in (gates.asked, ups.asked, downs.asked)]
        if asked[0] is not x or asked[1] is not x or asked[2] is None or made is not downs.answer:
            return False
        if not can_gate(gate, up) or not _agree(gated(gate, up), asked[2]):
            return False
    return True


def fuse_rotary(home: ModuleType, head_dim: int, device: torch.device, dtype: torch.dtype) -> bool:
    """Let a module's `apply_rotary_pos_emb` turn heads of that size in one kernel, if this computes the same bits.

    Raises whatever compiling and running a kernel does.
    """
    function = getattr(home, _ROTARY, None)
    if function is None:
        return False
    fused = function if isinstance(function, FusedRotary) else FusedRotary(function)
    if not fused.tries(head_dim, device, dtype):
        return False
    setattr(home, _ROTARY, fused)
    return True


class FusedRotary:
    """Stands for a modeling module's `apply_rotary_pos_emb`, for all networks of that module: what it has not been
    tried out for, and whatever gradients are wanted of, goes on to the original."""

    def __init__(self, original: Rotary) -> None:
        self._original = original
        self._proven: set[tuple[int, torch.device, torch.dtype]] = set()
        update_wrapper(self, original)

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        from server.engine.gpu_elementwise import can_rotate, rotate

        is_usual = args in ((), (1,)) and (not kwargs or kwargs == {"unsqueeze_dim": 1})
        if is_usual and (q.shape[-1], q.device, q.dtype) in self._proven and can_rotate(q, k, cos, sin):
            return rotate(q, k, cos, sin)
        return self._original(q, k, cos, sin, *args, **kwargs)

    @torch.inference_mode()
    def tries(self, head_dim: int, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether both give the same bits of heads of that size; if so, the kernel is used from now on."""
        from server.engine.gpu_elementwise import can_rotate, rotate

        noise = _noise(device, dtype)
        for rows, query_heads, key_heads in ((1, 5, 2), (6, 4, 4), (3, 9, 1)):
            q, k = (noise(1, rows, heads, head_dim).transpose(1, 2) for heads in (query_heads, key_heads))
            cos, sin = noise(1, rows, head_dim), noise(1, rows, head_dim)
            for given in ((q, k, cos, sin), (q.contiguous(), k, cos, sin)):
                if not can_rotate(*given):
                    return False
                pairs = zip(rotate(*given), self._original(*given), strict=True)
                if not all(torch.equal(got, expected) for got, expected in pairs):
                    return False
        self._proven.add((head_dim, device, dtype))
        return True


def _noise(device: torch.device, dtype: torch.dtype) -> Noise:
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(shape, generator=generator).to(device, dtype)
