"""From two checkpoint folders to an expert file and a report."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import numpy as np

from store.calibrate import Calibration, calibrate
from store.checkpoint import open_checkpoint
from store.codecs.base import Codec
from store.codecs.raw import Raw, is_raw
from store.codecs.t_switch import Knob, TSwitch
from store.errors import CheckpointError, InvalidRequestError
from store.expert_file import validate, write_expert
from store.expert_header import ExpertInfo, check_info
from store.fingerprint import manifest_of
from store.packed import PackedDense, PackedTensor, PackedTernary
from store.report import Overlap, Report, kind_rows, overlap_of, relative_error
from store.strict_json import FieldError
from store.task_vector import deltas_between

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, total); stages are "fingerprint", "compress", "calibrate" and "write"."""


def compress(
    base_folder: Path,
    tuned_folder: Path,
    out: Path,
    *,
    density: float = 0.05,
    knob: Knob | Literal["calibrated", "l1", "rms"] | None = None,
    tensor_density: Mapping[str, float] | None = None,
    exemplars: Sequence[str] | None = None,
    name: str | None = None,
    description: str | None = None,
    created: int | None = None,
    cache_dir: Path | None = None,
    progress: Progress | None = None,
) -> Report:
    """Compress a full fine-tune into an expert file with T-Switch; norms, biases and tiny tensors stay raw.

    Args:
        base_folder, tuned_folder: safetensors checkpoint folders of the same architecture.
        out: the expert file to write, replaced if it exists.
        density: fraction of each matrix's nonzeros to keep.
        knob: how to choose scales; None takes `calibrated` where there are exemplars, else `l1`.
        tensor_density: glob over tensor names → density of those, the first match counts; 0 leaves a tensor out.
        exemplars: example prompts, kept in the file; calibration runs on them.
        name, description, created: for the file's header; `created` in seconds since 1970.
        cache_dir: where the base's fingerprint is remembered.
        progress: see `Progress`.

    Raises:
        CheckpointError: a folder is unreadable, or not a fine-tune of the base.
        InvalidRequestError: a setting is out of range; `param` names it.
        StoreError: the file cannot be written.
    """
    started = time.monotonic()
    tell = progress or (lambda _stage, _done, _total: None)
    if knob is not None and knob not in list(Knob):
        raise InvalidRequestError(f"there is no knob {knob}; choose one of {', '.join(Knob)}", param="knob")
    chosen = Knob(knob) if knob is not None else (Knob.CALIBRATED if exemplars else Knob.L1)
    if chosen is Knob.CALIBRATED and not exemplars:
        raise InvalidRequestError("the calibrated knob needs exemplars; give some, or take the l1 knob", param="knob")
    info = ExpertInfo(
        codec=TSwitch.name,
        codec_params={"knob": chosen.value, "density": density},
        tool=_tool(),
        created=created,
        name=name,
        description=description or "",
        exemplars=tuple(exemplars or ()),
    )
    try:
        check_info(info)
    except FieldError as error:
        raise InvalidRequestError(f"{error.field} {error.message}", param=error.field) from None
    base = open_checkpoint(base_folder)
    codec_for = _codecs(density, dict(tensor_density or {}), chosen, list(base.tensors))
    tell("fingerprint", 0, 1)
    manifest = manifest_of(base_folder, cache_dir)

    packed: dict[str, PackedTensor] = {}
    overlaps: dict[str, Overlap] = {}
    for done, (tensor, delta) in enumerate(deltas_between(base, open_checkpoint(tuned_folder))):
        tell("compress", done, len(base.tensors))
        codec = codec_for(tensor, tuple(delta.shape))
        compressed = codec.compress(tensor, delta) if codec is not None else None
        overlaps[tensor] = overlap_of(tensor, delta, compressed)
        if compressed is not None:
            packed[tensor] = compressed

    found: Calibration | None = None
    if chosen is Knob.CALIBRATED and exemplars and any(isinstance(item, PackedTernary) for item in packed.values()):
        found = calibrate(base, tuned_folder, packed, exemplars, progress=progress)
        packed = {tensor: _scaled(tensor, item, found.multipliers.get(tensor, 1.0)) for tensor, item in packed.items()}
        info = replace(info, codec_params={**info.codec_params, "multiplier": found.multiplier})
    tell("write", 0, 1)
    header = write_expert(out, info, packed, manifest)
    validate(out, manifest)
    parameters = sum(tensor.span.numel for tensor in base.tensors.values())
    size = out.stat().st_size
    return Report(
        bytes=size,
        bits_per_param=header.bits_per_param,
        times_smaller=2 * parameters / size,
        density=header.density,
        relative_error=relative_error(overlaps, packed),
        knob=chosen,
        calibration=found,
        rows=kind_rows({name: tensor.span.numel for name, tensor in base.tensors.items()}, packed),
        seconds=time.monotonic() - started,
    )


def _codecs(
    density: float, overrides: dict[str, float], knob: Knob, names: list[str]
) -> Callable[[str, tuple[int, ...]], Codec | None]:
    """Which codec packs a tensor; None leaves it out."""
    start = Knob.RMS if knob is Knob.CALIBRATED else knob
    default = TSwitch(density, start)
    special = {glob: TSwitch(value, start) if value != 0.0 else None for glob, value in overrides.items()}
    for glob in special:
        if not any(fnmatchcase(name, glob) for name in names):
            raise InvalidRequestError(f"no tensor of the base matches {glob}", param="tensor_density")

    def codec_for(tensor: str, shape: tuple[int, ...]) -> Codec | None:
        matches = [codec for glob, codec in special.items() if fnmatchcase(tensor, glob)]
        if matches and matches[0] is None:
            return None
        if is_raw(shape):
            return Raw()
        return matches[0] if matches else default

    return codec_for


def _scaled(name: str, packed: PackedTensor, multiplier: float) -> PackedTensor:
    if isinstance(packed, PackedDense):
        return packed
    limits = np.finfo(np.float32)
    scale = packed.scale * multiplier
    if scale > float(limits.max):
        raise CheckpointError(f"tensor {name} has a delta too large for a float32 scale", param=name)
    return replace(packed, scale=float(np.float32(max(scale, float(limits.smallest_subnormal)))))


def _tool() -> str:
    try:
        return f"switchyard {version('switchyard')}"
    except PackageNotFoundError:
        return "switchyard"
