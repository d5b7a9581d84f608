"""A network's step as a list of operations with all their addresses, which `step.cpp` goes through in one call."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from server.engine.kv_cache import KVCache
from server.engine.outline import Norm, Outline, UnknownNetworkError
from server.engine.quantised import EightAbreast, FourAbreast, QuantisedLinear

RECORD = np.dtype(
    [
        *((name, "i8") for name in ("kind", "waits", "rows", "in", "out", "other", "in_size", "out_size")),
        *((name, "i8") for name in ("weight", "dtype", "scales", "bias", "bias_dtype", "terms", "term_count")),
        *((name, "i8") for name in ("choices", "choice_bytes", "which", "picked")),
        *((name, "f8") for name in ("eps", "plus")),
        *((name, "i8") for name in ("gate", "keys", "values", "heads", "kv_heads", "head_size", "window")),
        *((name, "i8") for name in ("cos", "sin")),
    ]
)
"""`Operation` of operations.hpp: numbers and addresses, 0 is none."""

NORM, PRODUCT, ROTATE, ATTEND, GATE, EMBED = range(6)
DTYPES = {torch.float32: 0, torch.bfloat16: 1}
_EIGHT_BITS, _FOUR_BITS = 2, 3
_GATES = {"silu": 0, "gelu_tanh": 1}
_FIRST_POSITIONS = 4096
_FIRST_ANSWERS = 32

Records = npt.NDArray[np.void]


@dataclass(frozen=True)
class Angles:
    """Cosines and sines of the first positions, `[positions, head_size]` float32."""

    cos: torch.Tensor
    sin: torch.Tensor


class Program:
    """The operations of a step of up to so many rows, and the memory that they work in.

    Attributes:
        modules: of every operation its module, or None: where weights come from.
        weights: numbers in all matrices.
        tail: operations on the rows whose logits are wanted: the last so many.
    """

    def __init__(self, outline: Outline, cache: KVCache, most_rows: int) -> None:
        self._outline = outline
        self._cache = cache
        self._dtype = DTYPES[cache.shape.dtype]
        self.most_rows = most_rows
        first = outline.layers[0]
        width = outline.head.in_features
        queries = max(layer.heads * layer.head_size for layer in outline.layers)
        keys = max(layer.kv_heads * layer.head_size for layer in outline.layers)
        gates = max(layer.gate.out_features for layer in outline.layers)
        sizes = {"hidden": width, "normed": width, "made": width, "queries": queries, "attended": queries}
        sizes |= {"keys": keys, "values": keys, "gate": gates, "up": gates}
        self._room = {name: torch.zeros(most_rows, size, dtype=torch.float32) for name, size in sizes.items()}
        self._room["logits"] = torch.zeros(min(most_rows, _FIRST_ANSWERS), outline.head.out_features)
        self._angles: list[Angles] = []
        self._positions = 0
        steps = list(self._operations())
        self.modules: list[nn.Module | None] = [module for module, _ in steps]
        self._plain = np.zeros(len(steps), RECORD)
        for record, (_, fields) in zip(self._plain, steps, strict=True):
            for name, value in fields.items():
                record[name] = value
        self._rotations = [place for place, (_, fields) in enumerate(steps) if fields["kind"] == ROTATE]
        self.weights = sum(m.in_features * m.out_features for m in self.modules if isinstance(m, nn.Linear))
        self.tail = 2
        self.see(min(_FIRST_POSITIONS, 16 * first.head_size))

    @property
    def logits(self) -> torch.Tensor:
        """`[rows, vocabulary]` float32: what a step ends with, in the first rows."""
        return self._room["logits"]

    def answer(self, rows: int) -> bool:
        """Have room for the logits of so many rows; whether addresses have changed for that."""
        if rows <= len(self.logits):
            return False
        self._room["logits"] = torch.zeros(rows, self.logits.shape[1])
        self._plain["out"][-1] = self.logits.data_ptr()
        return True

    def see(self, positions: int) -> bool:
        """Have the angles of so many positions; whether addresses have changed for that."""
        if positions <= self._positions:
            return False
        enough = max(_FIRST_POSITIONS, 1 << (positions - 1).bit_length())
        at = torch.arange(enough)[None]
        # Those that steps read stay until all of the new ones are there: memory may be short.
        angles = [
            Angles(cos[0].float().contiguous(), sin[0].float().contiguous())
            for cos, sin in (rotary(at) for rotary in self._outline.rotaries)
        ]
        self._angles, self._positions = angles, enough
        for place, layer in zip(self._rotations, self._outline.layers, strict=True):
            own = angles[layer.rotary]
            self._plain[place]["cos"], self._plain[place]["sin"] = own.cos.data_ptr(), own.sin.data_ptr()
        return True

    def records(self) -> Records:
        """The operations, with the weights where they are now."""
        records = self._plain.copy()
        for record, module in zip(records, self.modules, strict=True):
            if module is None:
                continue
            bias = module._parameters.get("bias")
            if isinstance(module, QuantisedLinear):
                integers, record["dtype"] = _integers(module)
                record["weight"], record["scales"] = integers.data_ptr(), module.packed.scales.data_ptr()
            else:
                weight = module.get_parameter("weight").data
                record["weight"], record["dtype"] = weight.data_ptr(), DTYPES[weight.dtype]
            if bias is not None:
                record["bias"], record["bias_dtype"] = bias.data_ptr(), DTYPES[bias.dtype]
        return records

    def _operations(self) -> Iterator[tuple[nn.Module | None, dict[str, Any]]]:
        table = self._outline.embedding.get_parameter("weight")
        yield (
            self._outline.embedding,
            {
                **{"kind": EMBED, "waits": 1, "out": self._at("hidden"), "eps": self._outline.scale},
                **{"in_size": table.shape[1], "out_size": table.shape[0]},
            },
        )
        residual = None
        for place, layer in enumerate(self._outline.layers):
            heads = {"heads": layer.heads, "kv_heads": layer.kv_heads, "head_size": layer.head_size}
            cached = {
                "dtype": self._dtype,
                "keys": self._cache.keys[place].data_ptr(),
                "values": self._cache.values[place].data_ptr(),
            }
            yield self._norm(layer.before, "hidden", "normed", residual)
            yield self._product(layer.query, "normed", "queries", waits=False)
            yield self._product(layer.key, "normed", "keys", waits=False)
            yield self._product(layer.value, "normed", "values")
            if layer.query_norm is not None:
                yield self._norm(layer.query_norm, "queries", "queries", heads=layer.heads)
            if layer.key_norm is not None:
                yield self._norm(layer.key_norm, "keys", "keys", heads=layer.kv_heads)
            yield (
                None,
                {
                    **{"kind": ROTATE, "waits": 1, "in": self._at("values"), "out": self._at("keys")},
                    **{"other": self._at("queries"), **heads, **cached},
                },
            )
            yield (
                None,
                {
                    **{"kind": ATTEND, "waits": 1, "in": self._at("queries"), "out": self._at("attended")},
                    **{"eps": layer.scale, "plus": layer.softcap, "window": layer.window, **heads, **cached},
                },
            )
            yield self._product(layer.output, "attended", "made")
            if layer.after is not None:
                yield self._norm(layer.after, "made", "made")
            yield self._norm(layer.before_gate, "hidden", "normed", "made")
            yield self._product(layer.gate, "normed", "gate", waits=False)
            yield self._product(layer.up, "normed", "up")
            yield (
                None,
                {
                    **{"kind": GATE, "waits": 1, "out": self._at("gate"), "other": self._at("up")},
                    **{"out_size": layer.gate.out_features, "gate": _GATES[layer.activation]},
                },
            )
            yield self._product(layer.down, "gate", "made")
            if layer.after_gate is not None:
                yield self._norm(layer.after_gate, "made", "made")
            residual = "made"
        yield self._norm(self._outline.norm, "hidden", "normed", residual)
        yield self._product(self._outline.head, "normed", "logits")

    def _at(self, name: str | None) -> int:
        return 0 if name is None else self._room[name].data_ptr()

    def _norm(
        self, norm: Norm, source: str, into: str, residual: str | None = None, heads: int = 1
    ) -> tuple[nn.Module, dict[str, Any]]:
        size = len(norm.module.get_parameter("weight"))
        return norm.module, {
            **{"kind": NORM, "waits": 1, "in": self._at(source), "out": self._at(into), "other": self._at(residual)},
            **{"in_size": size, "out_size": heads, "eps": norm.eps, "plus": norm.plus},
        }

    def _product(
        self, module: nn.Linear, source: str, into: str, *, waits: bool = True
    ) -> tuple[nn.Module, dict[str, Any]]:
        return module, {
            **{"kind": PRODUCT, "waits": int(waits), "in": self._at(source), "out": self._at(into)},
            **{"in_size": module.in_features, "out_size": module.out_features},
        }


def _integers(module: QuantisedLinear) -> tuple[torch.Tensor, int]:
    """Weights in eight or four bits, and what the library calls their format.

    Raises:
        UnknownNetworkError: they are in one of PyTorch's.
    """
    packed = module.packed
    if isinstance(packed, EightAbreast):
        return packed.levels, _EIGHT_BITS
    if isinstance(packed, FourAbreast):
        return packed.nibbles, _FOUR_BITS
    raise UnknownNetworkError(f"weights are kept as {type(packed).__name__}")
