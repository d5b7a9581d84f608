"""The expert file, version 1: one safetensors file that holds one compressed fine-tune. NumPy only; no torch.

docs/expert-file.md is the specification. Nothing of a file is used before it is checked, and no count that a file
claims is believed beyond what the base's own shapes allow.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, NoReturn

from store.deltas import Delta
from store.entry_payload import entry_of, packed_of
from store.errors import ExpertFileError, ExpertUnavailableError, InvalidRequestError, StoreError, WrongBaseError
from store.expert_header import (
    DenseEntry,
    ExpertHeader,
    LevelsEntry,
    LowRankEntry,
    OverwriteEntry,
    SparseEntry,
    TernaryEntry,
    density_of,
    features_of,
    header_from_json,
    header_to_json,
)
from store.expert_info import ExpertInfo
from store.expert_layout import MAX_HEADER_BYTES, laid_out, read_layout
from store.manifest import BaseManifest
from store.packed import PackedDense, PackedTensor
from store.strict_json import FieldError
from store.tensor_file import TensorTable

__all__ = [
    "MAX_HEADER_BYTES",
    "DenseEntry",
    "ExpertHeader",
    "ExpertInfo",
    "LevelsEntry",
    "LowRankEntry",
    "OverwriteEntry",
    "SparseEntry",
    "TernaryEntry",
    "digest_of",
    "read_deltas",
    "read_header",
    "read_packed",
    "tensor_bytes",
    "validate",
    "validate_open",
    "write_expert",
]


def write_expert(path: Path, info: ExpertInfo, tensors: Mapping[str, PackedTensor], base: BaseManifest) -> ExpertHeader:
    """Write an expert file, whole or not at all. Equal arguments give equal bytes.

    Args:
        path: where to; replaced if it exists.
        info: what to say about the expert.
        tensors: name → packed tensor; names and shapes as in `base`.
        base: the model the expert was made for.

    Returns:
        The header as written.

    Raises:
        InvalidRequestError: the header would break a rule of the format (too many exemplars, a bad name, ...).
        StoreError: the file cannot be written.
    """
    # bfloat16 first keeps every tensor aligned to its element size.
    order = sorted(tensors, key=lambda name: (not isinstance(tensors[name], PackedDense), name))
    entries = {name: entry_of(tensors[name]) for name in order}
    data_bytes = sum(tensor.nbytes for tensor in tensors.values())
    header = ExpertHeader(
        **vars(info),
        base_fingerprint=base.fingerprint,
        density=density_of(entries),
        bits_per_param=_bits_per_param(data_bytes, base),
        tensors=entries,
        required_features=features_of(entries, info.relative_to),
    )
    try:
        header_from_json(header_to_json(header))
        _check_shapes(header, base)
        header, head = laid_out(header, {name: tensor.nbytes for name, tensor in tensors.items()})
    except FieldError as error:
        raise InvalidRequestError(f"{error.field} {error.message}", param=error.field) from None
    payloads = (tensors[name].payload for name in order)
    _write_atomically(path, head, payloads)
    return header


def read_header(source: Path | bytes) -> ExpertHeader:
    """Read the header of an expert file, or of its bytes, and check all of it that needs neither the base nor the
    payloads.

    Raises:
        ExpertFileError: the file breaks a rule of the format; `param` is the tensor or the field.
        ExpertUnavailableError: there is no such file: of one that a cache handed out, not any more.
    """
    with _open(source) as file:
        return _read(file)[0]


def tensor_bytes(path: Path) -> dict[str, int]:
    """Bytes of each tensor's payload. Raises as `read_header`."""
    with _open(path) as file:
        return {name: span.nbytes for name, span in _read(file)[1].tensors.items()}


def validate(path: Path, base: BaseManifest) -> ExpertHeader:
    """Check everything there is to check, decoding every tensor once, one at a time.

    Raises:
        WrongBaseError: the expert was made for another base.
        ExpertFileError: the file is corrupt, hostile or unsupported; `param` is the tensor or the field.
        ExpertUnavailableError: there is no such file.
    """
    with _open(path) as file:
        return validate_open(file, base)


def validate_open(file: BinaryIO, base: BaseManifest) -> ExpertHeader:
    """`validate` of a file that is open already."""
    header, table = _read_for(file, base)
    for name, tensor in _packed(file, header, table):
        tensor.decode(name)
    return header


def read_deltas(source: Path | bytes, base: BaseManifest) -> Iterator[tuple[str, Delta]]:
    """Decode an expert file, or its bytes, tensor by tensor, `(name, delta)`, under the checks of `validate`.

    Raises:
        WrongBaseError, ExpertFileError: as `validate`, at the first `next` or at the tensor at fault.
        ExpertUnavailableError: as `validate`, at the first `next`.
    """
    for name, tensor in read_packed(source, base):
        yield name, tensor.decode(name)


def read_packed(source: Path | bytes, base: BaseManifest) -> Iterator[tuple[str, PackedTensor]]:
    """The tensors of an expert file, or of its bytes, one by one as they are stored: their payloads are not checked.

    Raises:
        WrongBaseError, ExpertFileError, ExpertUnavailableError: of what `validate` checks, all but the payloads.
    """
    with _open(source) as file:
        header, table = _read_for(file, base)
        yield from _packed(file, header, table)


def digest_of(path: Path) -> str:
    """Hex sha256 of a file's bytes: an expert's identity.

    Raises:
        StoreError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise StoreError(f"cannot read {path.name}: {error.strerror}") from None


def _open(source: Path | bytes) -> BinaryIO:
    if isinstance(source, bytes):
        return io.BytesIO(source)
    try:
        return source.open("rb")
    except FileNotFoundError:  # nothing is wrong with the expert: it may have been evicted or removed a moment ago
        raise ExpertUnavailableError(
            f"cannot read {source.name}: there is no such file, or not any more; check its name, or try again"
        ) from None
    except OSError as error:
        raise ExpertFileError(f"cannot read {source.name}: {error.strerror}", param="file") from None


def _read(file: BinaryIO) -> tuple[ExpertHeader, TensorTable]:
    try:
        return read_layout(file)
    except FieldError as error:
        _fail(error)


def _read_for(file: BinaryIO, base: BaseManifest) -> tuple[ExpertHeader, TensorTable]:
    header, table = _read(file)
    if header.base_fingerprint != base.fingerprint:
        raise WrongBaseError(
            f"the expert was made for the base {header.base_fingerprint[:12]}…, this one is {base.fingerprint[:12]}…; "
            "compress the fine-tune again with this base, or serve the base it was made for",
            param="base_fingerprint",
        )
    try:
        _check_shapes(header, base)
        bits = _bits_per_param(table.data_bytes, base)
        if not math.isclose(header.bits_per_param, bits, rel_tol=1e-6):
            raise FieldError(f"is {header.bits_per_param}, the file has {bits:.6g}", "bits_per_param")
    except FieldError as error:
        _fail(error)
    return header, table


def _check_shapes(header: ExpertHeader, base: BaseManifest) -> None:
    for name, entry in header.tensors.items():
        shape = base.tensors.get(name)
        if shape is None:
            raise FieldError("is no tensor of this base", name)
        if entry.shape != shape:
            raise FieldError(f"has the shape {list(entry.shape)}, the base's has {list(shape)}", name)


def _packed(file: BinaryIO, header: ExpertHeader, table: TensorTable) -> Iterator[tuple[str, PackedTensor]]:
    for name, span in table.tensors.items():
        entry = header.tensors[name]
        file.seek(span.start)
        payload = file.read(span.nbytes)
        if len(payload) != span.nbytes:
            raise ExpertFileError(f"tensor {name} ends beyond the end of the file: it is cut short", param=name)
        yield name, packed_of(entry, payload)


def _bits_per_param(data_bytes: int, base: BaseManifest) -> float:
    return 8 * data_bytes / max(1, sum(math.prod(shape) for shape in base.tensors.values()))


def _write_atomically(path: Path, head: bytes, payloads: Iterator[bytes]) -> None:
    temporary: Path | None = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = Path(file.name)
            file.write(head)
            for payload in payloads:
                file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        raise StoreError(f"cannot write {path.name}: {error.strerror}") from None
    finally:
        if temporary is not None:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


def _fail(error: FieldError) -> NoReturn:
    raise ExpertFileError(f"{error.field} {error.message}", param=error.field) from None
