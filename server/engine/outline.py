"""What a decoder-only network is made of, read off its modules and one observed run, for `server.engine.programs`.

Names of submodules decide the structure; all numbers come from what the network does when it runs: what it hands to the
attention interface, and what its rotary embedding gives for a position. Whether the outline is right is tried out
afterwards (`server.engine.native_steps`): a network that computes anything else is not run this way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import AttentionInterface

from server.engine.attention import ATTENTION_NAME, AttentionBatch, Segment, paged_attention

_NOTING = "switchyard_noting"
_PROBE_ROWS = 5
_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_SANDWICH = {"pre_feedforward_layernorm", "post_feedforward_layernorm"}
_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_GATED = {"gate_proj", "up_proj", "down_proj", "act_fn"}
_GROWING = ("dynamic", "longrope")
"""Rotary embeddings that depend on more than the position."""
_LOOKED_UP = 64
"""Rows of the table that show what is done to them."""
_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": functional.silu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}
_KNOWN = {"dropout", "scaling", "sliding_window", "softcap", "batch", "position_ids", "use_cache", "cache_position"}
"""What the attention interface may be handed beside the tensors. What else says something is not understood."""


class UnknownNetworkError(Exception):
    """The network has another structure; the message says where."""


@dataclass(frozen=True)
class Norm:
    """x / √(mean(x²) + eps) · (weight + plus)."""

    module: nn.Module
    eps: float
    plus: float


@dataclass(frozen=True)
class Layer:
    """One decoder layer: attention and gated product, each between norms and added to what it read.

    Attributes:
        before, after: norms around attention; `after` may be missing, and so below.
        before_gate, after_gate: norms around the gated product.
        query_norm, key_norm: of every head.
        rotary: which of the network's rotary embeddings it uses.
        window: tokens that it sees; 0: all.
        softcap: of its scores; 0: none.
    """

    before: Norm
    after: Norm | None
    before_gate: Norm
    after_gate: Norm | None
    query_norm: Norm | None
    key_norm: Norm | None
    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    output: nn.Linear
    gate: nn.Linear
    up: nn.Linear
    down: nn.Linear
    activation: str
    heads: int
    kv_heads: int
    head_size: int
    rotary: int
    scale: float
    window: int
    softcap: float


@dataclass(frozen=True)
class Outline:
    """A network.

    Attributes:
        scale: what the rows of the embedding's table are multiplied by.
        rotaries: for each rotary embedding, `[1, n]` positions → cosines and sines, `[1, n, head_size]` each.
    """

    embedding: nn.Module
    scale: float
    layers: tuple[Layer, ...]
    norm: Norm
    head: nn.Linear
    rotaries: tuple[Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]], ...]


@dataclass
class _Seen:
    """What one run shows: calls of the rotary embedding, and by layer what attention is handed."""

    rotary: list[tuple[tuple[Any, ...], dict[str, Any], tuple[torch.Tensor, torch.Tensor]]]
    angles: dict[int, Any]
    handed: dict[int, dict[str, Any]]


def outline_of(network: Any) -> Outline:
    """Args:
        network: a causal LM of transformers, made with `attn_implementation=ATTENTION_NAME`.

    Raises:
        UnknownNetworkError: it has another structure than this module knows.
    """
    decoder: Any = network.get_decoder()
    head: Any = network.get_output_embeddings()
    stack = getattr(decoder, "layers", None)
    if not isinstance(stack, nn.ModuleList) or not isinstance(head, nn.Linear):
        raise UnknownNetworkError("no stack of layers, or no linear head")
    if getattr(network.config.get_text_config(), "final_logit_softcapping", None) is not None:
        raise UnknownNetworkError("logits are capped")
    _need(decoder, {"embed_tokens", "layers", "norm", "rotary_emb"})
    if any(kind in _GROWING for kind in _rotary_kinds(decoder.rotary_emb)):
        raise UnknownNetworkError("rotary embeddings depend on the length")
    seen = _observe(network, decoder)
    layers = tuple(_layer(module, place, seen) for place, module in enumerate(stack))
    rotaries = tuple(_rotary(decoder.rotary_emb, args, kwargs) for args, kwargs, _ in seen.rotary)
    embedding = decoder.embed_tokens
    return Outline(embedding, _scale(embedding), layers, _norm(decoder.norm), head, rotaries)


@torch.no_grad()
def _scale(embedding: Any) -> float:
    """What an embedding multiplies the rows of its table by."""
    ids = torch.arange(min(_LOOKED_UP, len(embedding.weight)))
    rows, found = embedding.weight[ids].double(), embedding(ids).double()
    exact = (rows * found).sum() / rows.square().sum()
    scale = float(exact.to(embedding.weight.dtype))
    if not torch.allclose(found, rows * scale, rtol=1e-2, atol=1e-2 * float(found.abs().mean())):
        raise UnknownNetworkError("embeddings are more than rows of a table")
    return scale


def _rotary_kinds(rotary: Any) -> list[str]:
    kinds = getattr(rotary, "rope_type", None)
    return list(kinds.values()) if isinstance(kinds, dict) else [str(kinds)]


def _need(module: nn.Module, names: set[str], optional: set[str] = frozenset()) -> None:  # type: ignore[assignment]
    own = set(module._modules)
    if not names <= own <= names | optional:
        raise UnknownNetworkError(f"{type(module).__name__} consists of {', '.join(sorted(own))}")


@torch.inference_mode()
def _observe(network: Any, decoder: Any) -> _Seen:
    seen = _Seen([], {}, {})

    def noting(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        place: int = module.layer_idx  # type: ignore[assignment]
        query, key = args[:2]
        seen.handed[place] = {**kwargs, "heads": query.shape[1], "kv_heads": key.shape[1], "size": query.shape[3]}
        return paged_attention(module, *args, **kwargs)

    def turned(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], made: Any) -> None:
        seen.rotary.append((args, kwargs, made))

    def angles(module: nn.Module, _: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        place: int = module.layer_idx  # type: ignore[assignment]
        seen.angles[place] = kwargs.get("position_embeddings")

    AttentionInterface.register(_NOTING, noting)
    hooks = [decoder.rotary_emb.register_forward_hook(turned, with_kwargs=True)]
    for layer in decoder.layers:
        if not isinstance(getattr(layer, "self_attn", None), nn.Module):
            raise UnknownNetworkError(f"{type(layer).__name__} has no self_attn")
        hooks.append(layer.self_attn.register_forward_pre_hook(angles, with_kwargs=True))
    network.set_attn_implementation(_NOTING)
    try:
        ids = torch.zeros(1, _PROBE_ROWS, dtype=torch.int64)
        batch = AttentionBatch([Segment(0, _PROBE_ROWS, 0, ())], None, network.device)
        network(input_ids=ids, position_ids=torch.arange(_PROBE_ROWS)[None], use_cache=False, batch=batch)
    finally:
        network.set_attn_implementation(ATTENTION_NAME)
        for hook in hooks:
            hook.remove()
    return seen


def _layer(module: nn.Module, place: int, seen: _Seen) -> Layer:
    sandwich = set(module._modules) > _LAYER
    _need(module, _LAYER | _SANDWICH if sandwich else _LAYER)
    attention, mlp = module.get_submodule("self_attn"), module.get_submodule("mlp")
    _need(attention, _ATTENTION, {"q_norm", "k_norm"})
    _need(mlp, _GATED)
    handed = seen.handed.get(place, {})
    strange = [name for name, value in handed.items() if value is not None and name not in _KNOWN | _SHAPES]
    if not handed or strange:
        raise UnknownNetworkError(f"attention is handed {', '.join(strange) or 'nothing'}")
    angles = seen.angles.get(place)
    rotary = next((i for i, (_, _, made) in enumerate(seen.rotary) if made is angles), None)
    if angles is None or rotary is None or angles[0].shape[-1] != handed["size"]:
        raise UnknownNetworkError("heads are not turned by the network's rotary embedding, or not as a whole")
    norms = {name: _norm(child) for name, child in module.named_children() if name.endswith("layernorm")}
    own = {name: _norm(child, handed["size"]) for name, child in attention.named_children() if name.endswith("_norm")}
    products = {**dict(attention.named_children()), **dict(mlp.named_children())}
    linear = {name: _linear(child) for name, child in products.items() if name.endswith("_proj")}
    after = norms["post_attention_layernorm"]
    scaling = handed.get("scaling")
    return Layer(
        before=norms["input_layernorm"],
        after=after if sandwich else None,
        before_gate=norms["pre_feedforward_layernorm"] if sandwich else after,
        after_gate=norms.get("post_feedforward_layernorm"),
        query_norm=own.get("q_norm"),
        key_norm=own.get("k_norm"),
        **{field: linear[name] for field, name in _PRODUCTS.items()},
        activation=_activation(mlp.get_submodule("act_fn")),
        heads=handed["heads"],
        kv_heads=handed["kv_heads"],
        head_size=handed["size"],
        rotary=rotary,
        scale=handed["size"] ** -0.5 if scaling is None else scaling,
        window=handed.get("sliding_window") or 0,
        softcap=handed.get("softcap") or 0.0,
    )


_SHAPES = {"heads", "kv_heads", "size"}
_PRODUCTS = {
    "query": "q_proj",
    "key": "k_proj",
    "value": "v_proj",
    "output": "o_proj",
    "gate": "gate_proj",
    "up": "up_proj",
    "down": "down_proj",
}


def _linear(module: nn.Module) -> nn.Linear:
    if not isinstance(module, nn.Linear):
        raise UnknownNetworkError(f"{type(module).__name__} is no linear layer")
    return module


@torch.inference_mode()
def _norm(module: nn.Module, size: int | None = None) -> Norm:
    """Which of the known norms a module is, tried out on numbers with other weights."""
    weight = module._parameters.get("weight")
    eps = next((e for name in ("variance_epsilon", "eps") if isinstance(e := getattr(module, name, None), float)), None)
    if list(module.state_dict()) != ["weight"] or weight is None or weight.ndim != 1 or eps is None:
        raise UnknownNetworkError(f"{type(module).__name__} is no norm with one weight")
    if size is not None and len(weight) != size:
        raise UnknownNetworkError(f"{type(module).__name__} is not of one head")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, len(weight), generator=generator) * torch.tensor([1.0, 1e-3, 30.0, 0.0])[:, None]
    x, own = x.to(weight.dtype), weight.data
    try:
        weight.data = torch.randn(len(weight), generator=generator).to(weight.dtype)
        made, wide = module(x).float(), x.float()
        unit = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        errors = {plus: float((unit * (weight.data.float() + plus) - made).norm() / made.norm()) for plus in (0.0, 1.0)}
    finally:
        weight.data = own
    plus = min(errors, key=errors.__getitem__)
    if not errors[plus] < 16 * torch.finfo(weight.dtype).eps:
        raise UnknownNetworkError(f"{type(module).__name__} is no norm of a known form")
    return Norm(module, eps, plus)


@torch.inference_mode()
def _activation(module: nn.Module) -> str:
    x = torch.linspace(-9, 9, 97)
    made = module(x)
    for name, function in _ACTIVATIONS.items():
        if torch.allclose(made, function(x), rtol=1e-5, atol=1e-6):
            return name
    raise UnknownNetworkError(f"the activation {type(module).__name__} is not known")


def _rotary(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[torch.Tensor], Any]:
    """The same call with other positions: they are its one tensor of integers."""

    def angles(positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        def other(value: Any) -> Any:
            return positions if isinstance(value, torch.Tensor) and value.dtype is torch.int64 else value

        made: tuple[torch.Tensor, torch.Tensor] = module(
            *map(other, args), **{name: other(value) for name, value in kwargs.items()}
        )
        return made

    return angles
