"""Several experts as one, offline: static merges, tensor by tensor. The result is an expert like any other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from store.blending import learn_blend
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
from store.teacher import spread


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
    progress: Callable[[int, int], None] | None = None,
) -> ExpertHeader:
    """Merge expert files of one base into one, or negate one. Equal arguments give equal bytes.

    Matrices are stored as levels of up to 127 times a scale, norms and biases in bfloat16. The experts are in memory
    decoded, and one tensor of each in float32; of `opcm` only one expert and the sum so far, in float32; for `atlas`
    all experts in float32, and a model.

    Args:
        experts: files and the weights that their deltas are multiplied by first; two or more, or one with a weight
            other than 1 for task arithmetic, whose strength is 1 then unless it is given.
        base: what they were made for.
        out: the expert file to write.
        card: what to say about the result; its parents are the experts.
        weights: the base's checkpoint; experts that overwrite weights need it, and `atlas`, in a folder with the base's
            configuration and tokenizer.
        progress: called with (done, total) steps of `atlas`.

    Raises:
        CheckpointError: `atlas` cannot run the base.
        ExpertFileError, WrongBaseError: an expert is damaged or made for another base.
        InvalidRequestError: a setting is out of range.
    """
    if not experts or (len(experts) == 1 and (settings.method is not Method.TASK_ARITHMETIC or experts[0][1] == 1.0)):
        raise InvalidRequestError(
            "give two experts or more to merge; one alone can be negated or scaled, by the method "
            f"{Method.TASK_ARITHMETIC} and a weight: FILE=-1 takes its skill away",
            param="experts",
        )
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
    factor = settings.factor_of(len(experts))
    figures: dict[str, float] = {}
    if settings.method is Method.ATLAS:
        merged, figures = _blended(experts, base, settings, weights, progress)
    else:
        merged = (_folded if settings.method is Method.OPCM else _together)(experts, base, settings, weights)
    packed: dict[str, PackedTensor] = {}
    for tensor, values in merged:
        shape = base.tensors[tensor]
        codec = Raw() if is_raw(shape) else Quantised(MAX_LEVEL)
        scaled = torch.from_numpy(np.float32(factor) * values).view(shape)
        if (item := codec.compress(tensor, scaled)) is not None:
            packed[tensor] = item
    info = ExpertInfo(
        codec="merge",
        codec_params={"method": settings.method.value, "strength": factor, "experts": len(experts), **figures},
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


def _blended(
    experts: Sequence[tuple[Path, float]],
    base: BaseManifest,
    settings: MergeSettings,
    weights: Checkpoint | None,
    progress: Callable[[int, int], None] | None,
) -> tuple[Merged, dict[str, float]]:
    """By learned coefficients, and how near the result is to the experts."""
    if weights is None:
        raise InvalidRequestError("atlas runs the base: give its checkpoint", param="weights")
    if settings.shots < 1:
        raise InvalidRequestError(f"shots must be 1 or more, not {settings.shots}", param="shots")
    exemplars = []
    for path, weight in experts:
        if weight != 1.0:
            raise InvalidRequestError("atlas learns the weights by itself: give none", param="experts")
        if not (own := read_header(path).exemplars):
            raise InvalidRequestError(
                f"{path.name} holds no exemplars, and atlas learns from those: make it with some", param="experts"
            )
        exemplars.append(spread(own, settings.shots))
    sources = [
        {tensor: as_float_delta(delta, weights, tensor) for tensor, delta in read_deltas(path, base)}
        for path, _ in experts
    ]
    blend = learn_blend(weights.folder, weights, sources, exemplars, progress=progress)

    def merged() -> Merged:
        for tensor in sorted(set().union(*sources)):
            parts = zip(sources, blend.weights, strict=True)
            scaled = [np.float32(own[tensor]) * source[tensor] for source, own in parts if tensor in source]
            yield tensor, np.sum(scaled, axis=0, dtype=np.float32)

    return merged(), {"shots": settings.shots, "kl_at_start": blend.kl_at_start, "kl": blend.kl}
