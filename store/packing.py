"""Every tensor of a fine-tune through its codec, and the scales fitted afterwards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from store.adapter import Adapter
from store.calibrate import Calibration, calibrate
from store.checkpoint import Checkpoint
from store.codecs.base import Codec, CodecName
from store.codecs.choice import CALIBRATED, Recipe
from store.codecs.low_rank import keep_factors
from store.codecs.overwrite import overwrite
from store.codecs.raw import Raw
from store.codecs.t_switch import Knob
from store.errors import CheckpointError
from store.fine_tune import FineTune
from store.learning import Learned, learn
from store.packed import PackedTensor, PackedTernary
from store.report import Overlap, overlap_of

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, total); stages are "fingerprint", "learn", "compress", "calibrate" and "write"."""


@dataclass(frozen=True)
class Packed:
    """All tensors of an expert, and what is known of how close they come.

    Attributes:
        tensors: by name; what is not stored is not there.
        overlaps: of every tensor, for the relative error.
        changed: parameters that differ from the base.
        calibration, learned: what fitting found, of the codecs that fit.
    """

    tensors: dict[str, PackedTensor]
    overlaps: dict[str, Overlap]
    changed: int
    calibration: Calibration | None
    learned: Learned | None


def pack(
    recipe: Recipe,
    base: Checkpoint,
    fine_tune: FineTune,
    exemplars: list[str],
    budget: int,
    kept: Adapter | None,
    tell: Progress,
) -> Packed:
    """Compress all tensors; with `kept`, an adapter's factors stay what they are, and the rest is raw."""
    sizes = {name: tensor.span.numel for name, tensor in base.tensors.items()}
    codec_for = recipe.chooser(sizes, fine_tune.deltas)
    learned: Learned | None = None
    packed: dict[str, PackedTensor] = {}
    if recipe.codec is CodecName.FLEX_SWITCH:
        left_out = recipe.left_out(sizes)
        tuned = fine_tune.checkpoint()
        learned = learn(
            base, tuned, exemplars, budget, loss=recipe.loss, recipe=recipe.recipe, quantiser=recipe.quantiser,
            left_out=left_out, progress=tell,
        )  # fmt: skip
        packed = learned.tensors
    overlaps: dict[str, Overlap] = {}
    changed = 0
    for done, (tensor, delta) in enumerate(fine_tune.deltas()):
        tell("compress", done, len(base.tensors))
        changed += int(delta.count_nonzero())
        item: PackedTensor | None = None
        if recipe.codec is CodecName.OVERWRITE:
            item = overwrite(tensor, base.tensors[tensor], fine_tune.own().tensors[tensor])
        elif learned is None and (chosen := codec_for(tensor, tuple(delta.shape))) is not None:
            item = _item(chosen, tensor, delta, kept)
        if item is not None:
            packed[tensor] = item
        overlaps[tensor] = overlap_of(tensor, delta, packed.get(tensor))
    found: Calibration | None = None
    ternary = any(isinstance(item, PackedTernary) for item in packed.values())
    if recipe.codec in CALIBRATED and recipe.knob is Knob.CALIBRATED and exemplars and ternary:
        found = calibrate(base, fine_tune.checkpoint().folder, packed, exemplars, progress=tell)
        if recipe.codec is CodecName.COMPEFT:  # one scale for the whole task vector is what the method is
            shared = dict.fromkeys(found.multipliers, found.multiplier)
            found = replace(found, multipliers=shared, kl=found.kl_at_multiplier)
        packed = {tensor: _scaled(tensor, item, found.multipliers.get(tensor, 1.0)) for tensor, item in packed.items()}
    return Packed(packed, overlaps, changed, found, learned)


def _item(codec: Codec, tensor: str, delta: torch.Tensor, kept: Adapter | None) -> PackedTensor | None:
    if kept is None:
        return codec.compress(tensor, delta)
    if (factors := kept.factors(tensor)) is not None:
        return keep_factors(tensor, *factors)
    return Raw().compress(tensor, delta)


def _scaled(name: str, packed: PackedTensor, multiplier: float) -> PackedTensor:
    if not isinstance(packed, PackedTernary):
        return packed
    limits = np.finfo(np.float32)
    scale = packed.scale * multiplier
    if scale > float(limits.max):
        raise CheckpointError(f"tensor {name} has a delta too large for a float32 scale", param=name)
    return replace(packed, scale=float(np.float32(max(scale, float(limits.smallest_subnormal)))))
