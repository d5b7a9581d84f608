"""From a base and a fine-tune of it, a checkpoint or an adapter, to an expert file and a report."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from store.card import Card
from store.checkpoint import Checkpoint, open_checkpoint
from store.codecs.base import CodecName, Loss
from store.codecs.choice import CALIBRATED, Recipe
from store.codecs.flex_recipe import FlexRecipe, Quantiser
from store.codecs.t_switch import Knob
from store.compress_rules import check_together, codec_of, knob_of, loss_of, quantiser_of, recipe_of
from store.errors import CheckpointError, InvalidRequestError
from store.expert_file import digest_of, validate, write_expert
from store.expert_header import check_info
from store.expert_info import ExpertInfo
from store.expert_layout import header_room
from store.fine_tune import FineTune
from store.fingerprint import fingerprint_of, manifest_of
from store.floors import Floors
from store.held_out import Apart, apart_for, unseen_rows
from store.labelled import Labelled, checked
from store.measure import measure
from store.measured import LONGEST, Measured, rounded
from store.packed import PackedTensor
from store.packing import Progress, pack
from store.probe import probe
from store.report import Report, kind_rows, relative_error
from store.standing import chain_of, standing_on
from store.strict_json import FieldError


def compress(
    base_folder: Path,
    tuned_folder: Path,
    out: Path,
    *,
    codec: CodecName | str = CodecName.T_SWITCH,
    density: float = 0.05,
    knob: Knob | Literal["calibrated", "l1", "rms"] | None = None,
    rank: int | None = None,
    strength: float = 1.0,
    bits_per_param: float | None = None,
    max_size: int | None = None,
    loss: Loss | Literal["kl", "mse", "cka"] = Loss.KL,
    recipe: FlexRecipe | Literal["budget", "paper"] = FlexRecipe.BUDGET,
    quantiser: Quantiser | Literal["signed", "paper"] = Quantiser.SIGNED,
    max_kl: float | None = None,
    min_agreement: float | None = None,
    min_retention: float | None = None,
    tensor_density: Mapping[str, float] | None = None,
    exemplars: Sequence[str] | None = None,
    labelled: Sequence[Labelled] | None = None,
    name: str | None = None,
    description: str | None = None,
    created: int | None = None,
    card: Card | None = None,
    relative_to: Sequence[Path] = (),
    widened: Sequence[str] = (),
    cache_dir: Path | None = None,
    progress: Progress | None = None,
) -> Report:
    """Compress a fine-tune into an expert file; norms, biases and tiny tensors stay raw, or nearly so.

    Args:
        base_folder: a safetensors checkpoint folder.
        tuned_folder: one of the same architecture, or the folder of a PEFT adapter.
        out: the expert file to write, replaced if it exists.
        codec: the method.
        density: fraction of each matrix's nonzeros to keep (t-switch), or of all (compeft).
        knob: how to choose scales; None takes `calibrated` where there are exemplars, else `l1`.
        rank: of low-rank; None is 8, and of an adapter its own factors, kept as they are.
        strength: scale of compeft, in standard deviations; calibrated on top where there are exemplars.
        bits_per_param: what flex-switch may spend on the file, per parameter of the base; None is 0.04.
        max_size: the same in bytes.
        loss: what flex-switch learns by.
        recipe: how it learns.
        quantiser: of its recipe `paper`.
        max_kl, min_agreement, min_retention: refuse to write an expert further from its fine-tune; see `store.floors`.
        tensor_density: glob over tensor names → density of those, the first match counts; 0 leaves a tensor out.
        exemplars: example prompts, kept in the file. Calibration and learning run on them, and the expert is compared
            with its fine-tune on those that were held out, where there are any to spare.
        labelled: prompts with their answers, not kept in the file: they tell the share of the fine-tune's gain that the
            expert keeps. Those that it is made from are left out.
        name, description, created, card: for the file's header; `created` in seconds since 1970.
        relative_to: the expert file that the fine-tune started from, and then those that one stands on: the delta is
            taken against all of them on the base, and the expert stands on them too.
        widened: what earlier tries had asked for that ended below a floor; the header says so.
        cache_dir: where the base's fingerprint is remembered.
        progress: see `Progress`.

    Raises:
        CheckpointError: a folder is unreadable, or not a fine-tune of the base.
        InvalidRequestError: a setting is out of range; `param` names it.
        StoreError: the file cannot be written.
    """
    started = time.monotonic()
    floors = Floors(max_kl, min_agreement, min_retention)
    rows = checked(labelled) if labelled is not None else []
    densities = dict(tensor_density or {})
    check_together(
        codec=codec, knob=knob, bits_per_param=bits_per_param, max_size=max_size, tensor_density=densities,
        floors=floors, exemplars=bool(exemplars), labelled=bool(rows), stands=bool(relative_to),
    )  # fmt: skip
    tell = progress or (lambda _stage, _done, _total: None)
    chosen = Recipe(
        codec=codec_of(codec),
        density=density,
        knob=knob_of(knob, exemplars=bool(exemplars)),
        rank=Recipe.rank if rank is None else rank,
        strength=strength,
        loss=loss_of(loss),
        recipe=recipe_of(recipe),
        quantiser=quantiser_of(quantiser),
        tensor_density=densities,
    )
    chain = chain_of(relative_to) if relative_to else []
    tried = {"widened": ", ".join(widened)} if widened else {}
    info = ExpertInfo(
        codec=chosen.codec.value,
        codec_params=chosen.params() | tried,
        tool=_tool(),
        created=created,
        name=name,
        description=description or "",
        exemplars=tuple(exemplars or ()),
        card=_card_above(card or Card(), chain),
        relative_to=digest_of(chain[0]) if chain else None,
    )
    try:
        check_info(info)
    except FieldError as error:
        raise InvalidRequestError(f"{error.field} {error.message}", param=error.field) from None
    base = open_checkpoint(base_folder)
    sizes = {name: tensor.span.numel for name, tensor in base.tensors.items()}
    learns = chosen.codec is CodecName.FLEX_SWITCH
    shapes = {name: tensor.span.shape for name, tensor in base.tensors.items()}
    parameters = max(1, sum(sizes.values()))
    allowed = _allowed(bits_per_param, max_size, parameters) if learns else 0
    budget = allowed - header_room(replace(info, measured=LONGEST), shapes)
    if learns and budget <= 0:
        raise InvalidRequestError(
            f"{allowed} bytes are too few: the header alone takes about {allowed - budget}; allow more",
            param="bits_per_param" if max_size is None else "max_size",
        )
    tell("fingerprint", 0, 1)
    manifest = manifest_of(base_folder, cache_dir)
    with standing_on(base, manifest, chain) as under, FineTune(under, tuned_folder) as fine_tune:
        if chosen.codec is CodecName.LOW_RANK and rank is None and fine_tune.adapter is not None:
            fine_tune.check_low_rank()
            info = replace(info, codec_params={"method": fine_tune.adapter.config.kind.lower()})
            kept = fine_tune.adapter
        else:
            kept = None
        found_bits = None if fine_tune.adapter is not None else probe(under, fine_tune.own())
        if chosen.codec is CodecName.OVERWRITE:
            info = replace(info, codec_params={"fine_tune": fingerprint_of(fine_tune.own())})
        apart = apart_for(chosen, exemplars or ())
        scored = unseen_rows(rows, apart.seen)
        done = pack(chosen, under, fine_tune, list(exemplars or ()) if learns else apart.seen, budget, kept, tell)
        packed, found, learned = done.tensors, done.calibration, done.learned
        distance = relative_error(done.overlaps, packed)
        measured, unmeasured = _measured(base, under, fine_tune, packed, apart, distance, scored, floors, tell)
    floors.check(measured)
    info = replace(info, measured=measured)
    if learned is not None:
        figures = {"kl": learned.kl} | ({} if math.isnan(learned.held_out_kl) else {"kl_held_out": learned.held_out_kl})
        info = replace(
            info,
            codec_params=chosen.params() | {"budget": 8 * allowed / parameters, **figures, **tried},
        )
    if found is not None:
        info = replace(info, codec_params={**info.codec_params, "multiplier": found.multiplier})
    tell("write", 0, 1)
    header = write_expert(out, info, packed, manifest)
    validate(out, manifest)
    size = out.stat().st_size
    return Report(
        bytes=size,
        bits_per_param=8 * size / parameters,
        times_smaller=2 * sum(sizes.values()) / size,
        density=header.density,
        changed=done.changed / max(1, sum(sizes.values())),
        probe=found_bits,
        relative_error=distance,
        measured=measured,
        unmeasured=unmeasured,
        codec=chosen.codec,
        knob=chosen.knob if chosen.codec in CALIBRATED else None,
        calibration=found,
        learned=learned,
        rows=kind_rows(sizes, packed),
        seconds=time.monotonic() - started,
    )


def _card_above(card: Card, chain: Sequence[Path]) -> Card:
    """What an expert stands on is what it was made from, too."""
    digests = [digest_of(file) for file in chain[:1]]
    return replace(card, parents=tuple(dict.fromkeys([*card.parents, *digests])))


def _measured(
    base: Checkpoint,
    under: Checkpoint,
    fine_tune: FineTune,
    packed: Mapping[str, PackedTensor],
    apart: Apart,
    distance: float,
    scored: Sequence[Labelled],
    floors: Floors,
    tell: Progress,
) -> tuple[Measured, str | None]:
    """What `measure` finds, or why it could not, where nobody has asked for it."""
    if not apart.measured and not scored:
        return rounded(Measured(distance)), None
    try:
        tuned = fine_tune.checkpoint().folder
        options = {"held_out": apart.held_out, "relative_error": distance, "labelled": scored, "progress": tell}
        return measure(base, under, tuned, packed, apart.measured, **options), None  # type: ignore[arg-type]
    except CheckpointError as failure:
        if floors.any or scored:
            why = "it is run because a floor or labelled prompts ask how close the expert comes"
            raise CheckpointError(f"{failure.message}; {why}", param=failure.param) from failure
        return rounded(Measured(distance)), failure.message


def _allowed(bits_per_param: float | None, max_size: int | None, parameters: int) -> int:
    """Bytes that the file of a learned expert may take."""
    if max_size is not None:
        return max_size
    wanted = Recipe.bits_per_param if bits_per_param is None else bits_per_param
    return int(wanted * parameters / 8)


def _tool() -> str:
    try:
        return f"switchyard {version('switchyard')}"
    except PackageNotFoundError:
        return "switchyard"
