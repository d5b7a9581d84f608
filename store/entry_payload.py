"""Between a tensor's entry in the expert header, its bytes in the container, and the packed tensor they make."""

from __future__ import annotations

from store.encodings import Encoded
from store.expert_header import DenseEntry, LevelsEntry, LowRankEntry, OverwriteEntry, TensorEntry, TernaryEntry
from store.packed import PackedDense, PackedLevels, PackedLowRank, PackedOverwrite, PackedTensor, PackedTernary
from store.strict_json import FieldError
from store.tensor_file import TensorSpan


def span_of(entry: TensorEntry, nbytes: int) -> tuple[str, tuple[int, ...]]:
    """How the container holds an entry of `nbytes` bytes: its type and shape."""
    if isinstance(entry, LowRankEntry):
        return "BF16", (entry.rank * sum(entry.shape),)
    return ("BF16", entry.shape) if isinstance(entry, DenseEntry) else ("U8", (nbytes,))


def check_span(name: str, entry: TensorEntry, span: TensorSpan) -> None:
    """Raise FieldError unless the container holds an entry as `span_of` says."""
    dtype, shape = span_of(entry, span.nbytes)
    if isinstance(entry, DenseEntry):
        if span.dtype != dtype or span.shape != shape:
            raise FieldError(f"is stored as {span.dtype} {list(span.shape)}, not {dtype} {list(shape)}", name)
    elif span.dtype != "U8" or len(span.shape) != 1:
        raise FieldError(f"is stored as {span.dtype} {list(span.shape)}; an encoded tensor is U8 with one axis", name)
    elif isinstance(entry, TernaryEntry) and not entry.nnz <= 8 * span.nbytes <= 2 * entry.numel + 64:
        # No encoding is larger than the bitmap, nor smaller than its signs.
        raise FieldError(f"has {span.nbytes} payload bytes for {entry.nnz} of {entry.numel} elements", name)


def packed_of(entry: TensorEntry, payload: bytes) -> PackedTensor:
    """The packed tensor of an entry and its bytes."""
    if isinstance(entry, LowRankEntry):
        return PackedLowRank(entry.shape, payload, entry.rank)
    if isinstance(entry, DenseEntry):
        return PackedDense(entry.shape, payload)
    encoded = Encoded(entry.encoding, entry.params, payload)
    if isinstance(entry, OverwriteEntry):
        return PackedOverwrite(entry.shape, entry.nnz, encoded, entry.half, entry.sha256)
    if isinstance(entry, LevelsEntry):
        return PackedLevels(entry.shape, entry.nnz, entry.scale, encoded)
    return PackedTernary(entry.shape, entry.nnz, entry.scale, encoded)


def entry_of(tensor: PackedTensor) -> TensorEntry:
    """What the header says of a packed tensor."""
    if isinstance(tensor, PackedLowRank):
        return LowRankEntry(tensor.shape, tensor.rank)
    if isinstance(tensor, PackedDense):
        return DenseEntry(tensor.shape)
    encoded = tensor.encoded
    if isinstance(tensor, PackedOverwrite):
        return OverwriteEntry(tensor.shape, tensor.nnz, encoded.name, encoded.params, tensor.half, tensor.sha256)
    kind = LevelsEntry if isinstance(tensor, PackedLevels) else TernaryEntry
    return kind(tensor.shape, tensor.nnz, encoded.name, encoded.params, tensor.scale)
