"""Several experts as one, offline: static merges, tensor by tensor. The result is an expert like any other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from store.card import Card
from store.checkpoint import Checkpoint
from store.codecs.quantised import Quantised
from store.codecs.raw import Raw, is_raw
from store.encodings import MAX_LEVEL
from store.errors import InvalidRequestError
from store.expert_file import ExpertHeader, ExpertInfo, digest_of, read_deltas, read_header, write_expert
from store.manifest import BaseManifest
from store.merge_methods import MergeSettings, Method, Taus, merger
from store.opcm import Deltas, opcm
from store.overwriting import as_float_delta
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
    weights: Checkpoint | None = None,
    tool: str = "switchyard",
) -> ExpertHeader:
    """Merge expert files of one base into one. Equal arguments give equal bytes.

    Matrices are stored as levels of up to 127 times a scale, norms and biases in bfloat16. The experts are in memory
    decoded, and one tensor of each in float32; of `opcm` only one expert and the sum so far, in float32.

    Args:
        experts: files and the weights that their deltas are multiplied by first; two or more.
        base: what they were made for.
        out: the expert file to write.
        card: what to say about the result; its parents are the experts.
        weights: the base's checkpoint; experts that overwrite weights need it.

    Raises:
        ExpertFileError, WrongBaseError: an expert is damaged or made for another base.
        InvalidRequestError: a setting is out of range.
    """
    if len(experts) < 2:
        raise InvalidRequestError("give two experts or more to merge", param="experts")
    if not 0.0 <= settings.drop < 1.0:
        raise InvalidRequestError(f"drop must be at least 0 and below 1, not {settings.drop}", param="drop")
    if not 0.0 <= settings.dominant <= 1.0:
        raise InvalidRequestError(f"dominant must be 0 to 1, not {settings.dominant}", param="dominant")
    for path, _ in experts:
        if (below := read_header(path).relative_to) is not None:
            raise InvalidRequestError(
                f"{path.name} stands on the expert {below[:12]}…, which a merge leaves out: compress its fine-tune "
                "against the base, and merge that",
                param="experts",
            )
    merged = _folded if settings.method is Method.OPCM else _together
    packed: dict[str, PackedTensor] = {}
    for tensor, values in merged(experts, base, settings, weights):
        shape = base.tensors[tensor]
        codec = Raw() if is_raw(shape) else Quantised(MAX_LEVEL)
        scaled = torch.from_numpy(np.float32(settings.factor) * values).view(shape)
        if (item := codec.compress(tensor, scaled)) is not None:
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


Merged = Iterator[tuple[str, npt.NDArray[np.float32]]]


def _together(
    experts: Sequence[tuple[Path, float]], base: BaseManifest, settings: MergeSettings, weights: Checkpoint | None
) -> Merged:
    """Entry by entry, all experts decoded in memory."""
    sources = [(dict(read_deltas(path, base)), weight) for path, weight in experts]
    names = sorted(set().union(*(deltas for deltas, _ in sources)))

    def taus_of(tensor: str) -> Taus:
        numel = int(np.prod(base.tensors[tensor], dtype=np.int64))
        rows = [
            weight * as_float_delta(deltas[tensor], weights, tensor)
            if tensor in deltas
            else np.zeros(numel, dtype=np.float32)
            for deltas, weight in sources
        ]
        return np.stack(rows)

    merge = merger(settings, lambda: (taus_of(tensor) for tensor in names))
    return ((tensor, merge(tensor, taus_of(tensor))) for tensor in names)


def _folded(
    experts: Sequence[tuple[Path, float]], base: BaseManifest, settings: MergeSettings, weights: Checkpoint | None
) -> Merged:
    """One expert after the other, the sum so far and one of them in memory."""

    def taus() -> Iterator[Deltas]:
        for path, weight in experts:
            yield {
                tensor: np.float32(weight) * as_float_delta(delta, weights, tensor)
                for tensor, delta in read_deltas(path, base)
            }

    folded = opcm(taus(), base.tensors, dominant=settings.dominant, two_sided=settings.two_sided)
    return iter(sorted(folded.items()))
