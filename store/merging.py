"""Several experts as one, offline: static merges, tensor by tensor. The result is an expert like any other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from store.card import Card
from store.codecs.quantised import Quantised
from store.codecs.raw import Raw, is_raw
from store.deltas import Delta, SparseDelta
from store.encodings import MAX_LEVEL
from store.errors import InvalidRequestError
from store.expert_file import ExpertHeader, ExpertInfo, digest_of, read_deltas, write_expert
from store.manifest import BaseManifest
from store.merge_methods import MergeSettings, Taus, merger
from store.packed import PackedTensor


def merge_experts(
    experts: Sequence[tuple[Path, float]],
    base: BaseManifest,
    out: Path,
    settings: MergeSettings,
    *,
    name: str | None = None,
    description: str = "",
    card: Card | None = None,
    tool: str = "switchyard",
) -> ExpertHeader:
    """Merge expert files of one base into one. Equal arguments give equal bytes.

    Matrices are stored as levels of up to 127 times a scale, norms and biases in bfloat16. The experts are in memory
    decoded, and one tensor of each in float32.

    Args:
        experts: files and the weights that their deltas are multiplied by first; two or more.
        base: what they were made for.
        out: the expert file to write.
        card: what to say about the result; its parents are the experts.

    Raises:
        ExpertFileError, WrongBaseError: an expert is damaged or made for another base.
        InvalidRequestError: a setting is out of range.
    """
    if len(experts) < 2:
        raise InvalidRequestError("give two experts or more to merge", param="experts")
    if not 0.0 <= settings.drop < 1.0:
        raise InvalidRequestError(f"drop must be at least 0 and below 1, not {settings.drop}", param="drop")
    sources = [(dict(read_deltas(path, base)), weight) for path, weight in experts]
    names = sorted(set().union(*(deltas for deltas, _ in sources)))

    def taus_of(tensor: str) -> Taus:
        return np.stack([weight * _flat(deltas.get(tensor), base.tensors[tensor]) for deltas, weight in sources])

    merge = merger(settings, lambda: (taus_of(tensor) for tensor in names))
    packed: dict[str, PackedTensor] = {}
    for tensor in names:
        shape = base.tensors[tensor]
        merged = np.float32(settings.factor) * merge(tensor, taus_of(tensor))
        codec = Raw() if is_raw(shape) else Quantised(MAX_LEVEL)
        if (item := codec.compress(tensor, torch.from_numpy(merged).view(shape))) is not None:
            packed[tensor] = item
    info = ExpertInfo(
        codec="merge",
        codec_params={"method": settings.method.value, "strength": settings.factor, "experts": len(experts)},
        tool=tool,
        name=name,
        description=description,
        card=replace(card or Card(), parents=tuple(dict.fromkeys(digest_of(path) for path, _ in experts))),
    )
    return write_expert(out, info, packed, base)


def _flat(delta: Delta | None, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    if delta is None:
        return np.zeros(int(np.prod(shape, dtype=np.int64)), dtype=np.float32)
    if isinstance(delta, SparseDelta):
        values = np.zeros(int(np.prod(shape, dtype=np.int64)), dtype=np.float32)
        values[delta.indices] = delta.levels * np.float32(delta.scale)
        return values
    return delta.values.reshape(-1)
