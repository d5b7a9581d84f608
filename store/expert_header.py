"""The expert file's own header: what it says, as a value and as JSON. Checks all that needs no base and no payload."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from store.encodings import MAX_LEVEL
from store.expert_info import DIGEST_PATTERN, ExpertInfo, info_from_json, info_to_json
from store.patterns import Half
from store.positions import GROUPED, PARAMETER, RICE_ZEROS
from store.strict_json import FieldError, Fields, parse_json
from store.tensor_file import MAX_NUMEL, MAX_RANK

FORMAT_VERSION = 1
COMPACT, LEVELS, LOW_RANK, OVERWRITE, RELATIVE = "compact", "levels", "low-rank", "overwrite", "relative"
KNOWN_FEATURES = frozenset({COMPACT, GROUPED, LEVELS, LOW_RANK, OVERWRITE, RELATIVE, RICE_ZEROS})
"""Kinds and layouts that came after the first readers: a file that uses one says so in `required_features`."""
MAX_RANK_OF_FACTORS = 65536
_MAX_SCALE = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class DenseEntry:
    """A tensor stored whole in bfloat16."""

    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class LowRankEntry(DenseEntry):
    """A matrix stored as two bfloat16 factors, `[rows, rank]` and `[rank, columns]`; it decodes to a dense one."""

    rank: int


@dataclass(frozen=True)
class SparseEntry:
    """How a tensor with `nnz` nonzeros is stored; see `store.encodings` for `encoding` and `params`."""

    shape: tuple[int, ...]
    nnz: int
    encoding: str
    params: dict[str, int]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class TernaryEntry(SparseEntry):
    """The nonzeros are ±`scale`."""

    scale: float


@dataclass(frozen=True)
class LevelsEntry(SparseEntry):
    """The nonzeros are whole multiples of `scale`, up to ±127."""

    scale: float


@dataclass(frozen=True)
class OverwriteEntry(SparseEntry):
    """`nnz` weights get new bit patterns of a 16-bit type, whose digest is `sha256`; the others stay the base's."""

    half: Half
    sha256: str


TensorEntry = TernaryEntry | LevelsEntry | OverwriteEntry | DenseEntry


@dataclass(frozen=True, kw_only=True)
class ExpertHeader(ExpertInfo):
    """The header of an expert file.

    Attributes:
        base_fingerprint: hex sha256 of the base's weights (`store.fingerprint`).
        density: nonzeros of the sparse tensors / elements of the sparse tensors; 0 without any.
        bits_per_param: bits of all payloads / parameters of the whole base, stored or not.
        tensors: name → how it is stored.
        required_features: words a reader must know, or refuse the file.
    """

    base_fingerprint: str
    density: float
    bits_per_param: float
    tensors: dict[str, TensorEntry]
    required_features: tuple[str, ...] = ()

    @property
    def is_exact(self) -> bool:
        """Whether the expert, alone and at weight 1, is its fine-tune bit by bit, in a type that holds it."""
        return self.codec == OVERWRITE and all(isinstance(entry, OverwriteEntry) for entry in self.tensors.values())

    @property
    def half(self) -> Half | None:
        """The one 16-bit type of all that is overwritten; None where nothing is, or several are there."""
        halves = {entry.half for entry in self.tensors.values() if isinstance(entry, OverwriteEntry)}
        return halves.pop() if len(halves) == 1 else None


def check_info(info: ExpertInfo) -> None:
    """Raise FieldError if a header could not carry `info`: to be told before an hour of work, not after."""
    features = features_of({}, info.relative_to)
    empty = ExpertHeader(
        **vars(info),
        base_fingerprint="0" * 64,
        density=0.0,
        bits_per_param=0.0,
        tensors={},
        required_features=features,
    )
    header_from_json(header_to_json(empty))


def density_of(tensors: Mapping[str, TensorEntry]) -> float:
    """The density as `ExpertHeader` defines it."""
    sparse = [entry for entry in tensors.values() if isinstance(entry, SparseEntry)]
    return sum(entry.nnz for entry in sparse) / max(1, sum(entry.numel for entry in sparse))


def features_of(tensors: Mapping[str, TensorEntry], relative_to: str | None = None) -> tuple[str, ...]:
    """The required features of a file with these entries, sorted."""
    used = {RELATIVE} if relative_to is not None else set()
    used |= {_kind_of(entry) for entry in tensors.values()}
    used |= {entry.encoding for entry in tensors.values() if isinstance(entry, SparseEntry)}
    return tuple(sorted(used & KNOWN_FEATURES))


def _kind_of(entry: TensorEntry) -> str:
    if isinstance(entry, LowRankEntry):
        return LOW_RANK
    if isinstance(entry, DenseEntry):
        return "dense"
    if isinstance(entry, OverwriteEntry):
        return OVERWRITE
    return LEVELS if isinstance(entry, LevelsEntry) else "ternary"


def header_to_json(header: ExpertHeader, sizes: Sequence[int] | None = None) -> str:
    """The header as JSON without spaces; equal headers give equal text. With `sizes`, which a compact file needs, the
    bytes of each payload."""
    document: dict[str, object] = {
        "format": FORMAT_VERSION,
        "base_fingerprint": header.base_fingerprint,
        "codec": header.codec,
        "codec_params": dict(sorted(header.codec_params.items())),
        "density": header.density,
        "bits_per_param": header.bits_per_param,
        "tool": header.tool,
        "required_features": list(header.required_features),
    }
    document |= info_to_json(header)
    document["tensors"] = {name: _entry_to_json(entry) for name, entry in header.tensors.items()}
    if sizes is not None:
        document["bytes"] = list(sizes)
    return json.dumps(document, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def _entry_to_json(entry: TensorEntry) -> dict[str, object]:
    common = {"kind": _kind_of(entry), "shape": list(entry.shape), "numel": entry.numel}
    if isinstance(entry, LowRankEntry):
        return {**common, "rank": entry.rank}
    if isinstance(entry, DenseEntry):
        return common
    if isinstance(entry, OverwriteEntry):
        values = {"dtype": entry.half.value, "sha256": entry.sha256}
        return {**common, "nnz": entry.nnz, "encoding": entry.encoding, **entry.params, **values}
    return {**common, "nnz": entry.nnz, "scale": entry.scale, "encoding": entry.encoding, **entry.params}


def header_from_json(text: str) -> ExpertHeader:
    """Parse and check the JSON header.

    Unknown keys are ignored: a change that an old reader must not ignore comes with a required feature.

    Raises:
        FieldError: naming the field or the tensor.
    """
    fields = Fields(parse_json(text.encode("utf-8"), "switchyard"), "switchyard")
    check_version(fields)
    return header_from_fields(fields)


def check_version(fields: Fields) -> tuple[str, ...]:
    """The required features. Raises FieldError if this reader must not read on."""
    version = fields.integer("format", low=0, high=2**31)
    if version != FORMAT_VERSION:
        fields.fail("format", f"is {version}; this Switchyard reads version {FORMAT_VERSION}")
    features = fields.strings("required_features", max_items=64, max_bytes=100)
    if unknown := sorted(set(features) - KNOWN_FEATURES):
        fields.fail("required_features", f"asks for {', '.join(unknown)}: this file needs a newer Switchyard")
    return features


def header_from_fields(fields: Fields) -> ExpertHeader:
    """The header in a document whose version is checked. Raises as `header_from_json`."""
    features = fields.strings("required_features", max_items=64, max_bytes=100)
    entries = fields.child("tensors")
    tensors = {name: _entry_from_json(entries.get(name), name) for name in entries.names()}
    info = info_from_json(fields)
    if missing := sorted(set(features_of(tensors, info["relative_to"])) - set(features)):
        fields.fail("required_features", f"lacks {', '.join(missing)}, which the file uses")
    if info["relative_to"] is not None and any(isinstance(entry, OverwriteEntry) for entry in tensors.values()):
        fields.fail("relative_to", "is given, and a tensor overwrites the base's own weights: it cannot be both")
    density = fields.number("density", low=0.0, high=1.0)
    if not math.isclose(density, density_of(tensors), rel_tol=1e-6):
        fields.fail("density", f"is {density}, the tensors' counts give {density_of(tensors):.6g}")
    return ExpertHeader(
        **info,
        base_fingerprint=fields.text("base_fingerprint", max_bytes=64, pattern=DIGEST_PATTERN),
        density=density,
        bits_per_param=fields.number("bits_per_param", low=0.0, high=1024.0),
        tensors=tensors,
        required_features=features,
    )


def _entry_from_json(value: object, name: str) -> TensorEntry:
    try:
        entry = Fields(value, name)
        kind = entry.text("kind", max_bytes=32)
        shape = entry.shape("shape", max_rank=MAX_RANK, max_numel=MAX_NUMEL)
        numel = entry.integer("numel", low=1, high=MAX_NUMEL)
        if numel != math.prod(shape):
            entry.fail("numel", f"is {numel}, its shape has {math.prod(shape)} elements")
        if kind == "dense":
            return DenseEntry(shape)
        if kind == LOW_RANK:
            if len(shape) != 2:
                entry.fail("shape", "must have two dimensions: only matrices have low-rank factors")
            return LowRankEntry(shape, entry.integer("rank", low=1, high=min(*shape, MAX_RANK_OF_FACTORS)))
        if kind not in ("ternary", LEVELS, OVERWRITE):
            entry.fail("kind", f"is {kind}; this Switchyard knows ternary, {LEVELS}, {OVERWRITE}, dense and {LOW_RANK}")
        nnz = entry.integer("nnz", low=1, high=numel)
        if kind == OVERWRITE:
            return _overwrite(entry, shape, nnz)
        scale = _scale(entry)
        encoding, params = _layout(entry)
        if kind == "ternary":
            return TernaryEntry(shape, nnz, encoding, params, scale)
        params["top"] = entry.integer("top", low=1, high=MAX_LEVEL)
        params["values"] = entry.integer("values", low=1, high=MAX_NUMEL)
        return LevelsEntry(shape, nnz, encoding, params, scale)
    except FieldError as error:
        where = "" if error.field == name else f"{error.field} "
        raise FieldError(where + error.message, name) from None


def _overwrite(entry: Fields, shape: tuple[int, ...], nnz: int) -> OverwriteEntry:
    encoding, params = _layout(entry)
    params |= {key: entry.integer(key, low=1, high=MAX_NUMEL) for key in ("high", "low")}
    dtype = entry.text("dtype", max_bytes=8)
    if dtype not in list(Half):
        entry.fail("dtype", f"is {dtype}; weights that are overwritten are {' or '.join(Half)}")
    return OverwriteEntry(
        shape, nnz, encoding, params, Half(dtype), entry.text("sha256", max_bytes=64, pattern=DIGEST_PATTERN)
    )


def _layout(entry: Fields) -> tuple[str, dict[str, int]]:
    encoding = entry.text("encoding", max_bytes=32)
    if encoding not in PARAMETER:
        entry.fail("encoding", f"is {encoding}; this Switchyard knows {', '.join(PARAMETER)}")
    rule = PARAMETER[encoding]
    return encoding, {rule[0]: entry.integer(rule[0], low=rule[1], high=rule[2])} if rule else {}


def _scale(entry: Fields) -> float:
    scale = entry.number("scale", low=0.0, high=_MAX_SCALE)
    if scale == 0.0 or float(np.float32(scale)) != scale:
        entry.fail("scale", "must be a float32 value above zero")
    return scale
