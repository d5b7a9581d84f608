"""What the GPU benchmark measures on: a base of random weights, and synthetic experts in their packed forms."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from bench.gpu_lab import Lab, Size
from server.engine.attention import ATTENTION_NAME
from server.engine.expert import DecodedExpert
from server.engine.kernels import PackedDelta, pack
from server.engine.kernels.types import BLOCK, BitPlanes, SparseRows
from server.engine.model import BaseModel
from server.engine.parcel import Parcel, parcel_bytes, wrap
from store.deltas import SparseDelta
from store.encodings import encode_smallest
from store.manifest import BaseManifest
from store.packed import PackedTernary

Shape = tuple[int, int]

_CPU = torch.device("cpu")
_SCALE = float(np.float32(0.001))
_TILE_ELEMENTS = 1 << 22
"""Of a tensor that large the nonzeros are drawn; larger ones repeat it, row block by row block."""


def random_base(lab: Lab, size: Size) -> BaseModel:
    """A Llama of that size with random weights, made on the device."""
    torch.manual_seed(0)
    with lab.device:
        network = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config_of(size), dtype=lab.dtype, attn_implementation=ATTENTION_NAME
        )
    manifest = BaseManifest("random", {name: tuple(p.shape) for name, p in network.named_parameters()})
    return BaseModel.of_network(network, manifest, feature_layer=1)


def config_of(size: Size) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        vocab_size=size.vocabulary,
        max_position_embeddings=size.context,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )


def layer_shapes(size: Size) -> dict[str, Shape]:
    """(out, in) of the matrices of one layer."""
    head = size.hidden // size.heads
    return {
        "q": (size.hidden, size.hidden),
        "k": (size.kv_heads * head, size.hidden),
        "gate": (size.intermediate, size.hidden),
        "down": (size.hidden, size.intermediate),
    }


def matrices(model: BaseModel) -> dict[str, Shape]:
    """Every matrix of the decoder's layers."""
    found = {name: p.shape for name, p in model.parameters.items() if p.ndim == 2 and ".layers." in name}
    return {name: (shape[0], shape[1]) for name, shape in found.items()}


def random_delta(shape: Shape, density: float, seed: int = 0) -> PackedDelta:
    """A ternary delta of about that density, packed, on the CPU."""
    rows, columns = shape
    tile = max(BLOCK, _TILE_ELEMENTS // columns // BLOCK * BLOCK)
    if rows <= tile or rows % tile:
        return _drawn(shape, density, seed)
    return _stacked(_drawn((tile, columns), density, seed), rows // tile)


def stored(shape: Shape, density: float, seed: int = 0) -> PackedTernary:
    """A ternary tensor of that density as an expert file holds it."""
    delta = _sparse(shape, density, seed)
    encoded = encode_smallest(delta.indices, delta.levels, math.prod(shape))
    return PackedTernary(shape, len(delta.indices), delta.scale, encoded)


def _drawn(shape: Shape, density: float, seed: int) -> PackedDelta:
    return pack(_sparse(shape, density, seed), _CPU)


def _sparse(shape: Shape, density: float, seed: int) -> SparseDelta:
    rng = np.random.default_rng(seed)
    numel = math.prod(shape)
    # Exactly that many: at the density where the form changes, every tensor must be of one form.
    kept = np.sort(rng.choice(numel, math.ceil(density * numel), replace=False, shuffle=False)).astype(np.int32)
    levels = np.where(rng.random(len(kept), np.float32) < 0.5, np.int8(-1), np.int8(1))
    return SparseDelta(shape, kept, levels, _SCALE)


def _stacked(delta: PackedDelta, times: int) -> PackedDelta:
    """The same rows several times, one below the other."""
    rows, columns = delta.shape
    shape = (times * rows, columns)
    if isinstance(delta, BitPlanes):
        return dataclasses.replace(delta, shape=shape, words=delta.words.repeat(times, 1, 1, 1, 1))
    if not isinstance(delta, SparseRows):
        raise TypeError(f"{type(delta).__name__} cannot be stacked")
    steps = torch.arange(times, dtype=torch.int32)[:, None]
    starts = (delta.starts[:-1] + steps * len(delta.entries)).flatten()
    end = torch.tensor([times * len(delta.entries)], dtype=torch.int32)
    return dataclasses.replace(
        delta,
        shape=shape,
        order=(delta.order + steps * rows).flatten(),
        starts=torch.cat([starts, end]),
        entries=delta.entries.repeat(times),
    )


def mapped(delta: PackedDelta, change: Callable[[torch.Tensor], torch.Tensor]) -> PackedDelta:
    """The same delta with each of its tensors changed: moved, or copied."""
    found = {field.name: getattr(delta, field.name) for field in dataclasses.fields(delta)}
    changed: dict[str, Any] = {name: change(value) for name, value in found.items() if isinstance(value, torch.Tensor)}
    return dataclasses.replace(delta, **changed)


def parcel(model: BaseModel, density: float) -> Parcel:
    """A whole expert of that density in one buffer on the CPU; it moves every matrix of the decoder's layers."""
    shapes = matrices(model)
    made = {shape: _made(shape, density) for shape in dict.fromkeys(shapes.values())}
    fields = (
        value.nbytes
        for shape in shapes.values()
        for field in dataclasses.fields(made[shape])
        if isinstance(value := getattr(made[shape], field.name), torch.Tensor)
    )
    return wrap(f"{density}", parcel_bytes(fields), ((name, made[shape]) for name, shape in shapes.items()))


_made = functools.cache(random_delta)
"""Drawing takes longer than putting together, and every section asks for the same ones."""


def experts_of(template: Parcel, count: int, device: torch.device) -> Iterator[DecodedExpert]:
    """Experts of the same contents, each in device memory of its own."""
    first = template.buffer.to(device)
    for number in range(count):
        buffer = first.clone() if number < count - 1 else first
        own = dataclasses.replace(template, digest=f"{template.digest}/{number}", buffer=buffer)
        yield DecodedExpert(own.digest, own.tensors(), own)


def bits_per_weight(template: Parcel, model: BaseModel) -> float:
    return 8 * template.nbytes / sum(math.prod(shape) for shape in matrices(model).values())


def weight_bytes(model: BaseModel, names: Mapping[str, object]) -> int:
    return sum(model.parameters[name].nbytes for name in names)
