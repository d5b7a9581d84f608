"""What every implementation of the kernels must do, as checks on random batches."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from hypothesis import strategies as st

from server.engine.kernels import Group, Kernels, pack
from server.engine.kernels.merging import merge_tensor_reference
from server.engine.kernels.types import BitPlanes, ByteLists, PackedDelta, SparseRows
from store.deltas import Delta, DenseDelta, SparseDelta
from store.encodings import encode_in_groups, encode_levels, encode_smallest
from store.packed import PackedLevels, PackedTernary
from tests.engine.kernels.builders import as_matrix, sparse_delta

CPU = torch.device("cpu")
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Of the largest sum of magnitudes: rounding in any order of summation, and once to the dtype."""

Terms = list[tuple[float, Delta]]

weights = st.one_of(st.just(1.0), st.floats(-2, 3, width=32))
densities = st.one_of(st.just(0.0), st.floats(0, 0.06), st.floats(0, 1), st.just(1.0))
tops = st.sampled_from([1, 1, 1, 1, 3, 7, 40, 127])
odd_weights = st.sampled_from([0.0, -0.0, float("nan"), float("inf"), 1e-40, 3e38])


@st.composite
def terms_of(draw: st.DrawFn, shape: tuple[int, int]) -> Terms:
    terms: Terms = []
    for _ in range(draw(st.integers(0, 3))):
        seed = draw(st.integers(0, 2**32 - 1))
        delta: Delta
        if draw(st.integers(0, 5)) == 0:
            delta = DenseDelta(np.random.default_rng(seed).standard_normal(shape, np.float32) * np.float32(0.01))
        else:
            delta = sparse_delta(seed, shape, draw(densities), top=draw(tops))
        terms.append((draw(weights), delta))
    return terms


def allowed(magnitude: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Errors that rounding explains; results may be so small that there are only steps of one size between them."""
    limits = torch.finfo(dtype)
    return TOLERANCE[dtype] * magnitude + limits.smallest_normal * limits.eps


def matrix_of(delta: Delta) -> np.ndarray:
    return as_matrix(delta) if isinstance(delta, SparseDelta) else delta.values


def device_of(kernels: Kernels) -> torch.device:
    return torch.device("cuda") if kernels.name == "triton" and torch.cuda.is_available() else CPU


def check(
    kernels: Kernels,
    shape: tuple[int, int],
    parts: Sequence[tuple[int, int, Terms]],
    dtype: torch.dtype,
    lanes: int | None = None,
) -> None:
    """`add_linear` against dense matrices in float64.

    Args:
        parts: rows left out before a group, its rows, its terms.
        lanes: of lists; None for those that the kernels read fastest.
    """
    lanes = lanes or kernels.lanes
    out, width = shape
    rows = sum(gap + size for gap, size, _ in parts) + 1
    rng = np.random.default_rng(rows)
    device = device_of(kernels)
    y = torch.from_numpy(rng.standard_normal((rows, out))).to(device, dtype)
    x = torch.from_numpy(rng.standard_normal((rows, width))).to(device, dtype)
    expected, magnitude = y.double(), y.double().abs()
    before, x_before = y.clone(), x.clone()
    groups, touched, stop = [], torch.zeros(rows, dtype=torch.bool, device=device), 0
    for gap, size, terms in parts:
        start, stop = stop + gap, stop + gap + size
        for weight, delta in terms:
            matrix = torch.from_numpy(matrix_of(delta)).to(device).double()
            expected[start:stop] += weight * (x[start:stop].double() @ matrix.T)
            magnitude[start:stop] += abs(weight) * (x[start:stop].double().abs() @ matrix.abs().T)
        touched[start:stop] = bool(terms)
        groups.append(Group(start, stop, tuple((weight, pack(delta, device, lanes)) for weight, delta in terms)))
    kernels.add_linear(y, x, groups)
    assert bool(((y.double() - expected).abs() <= allowed(magnitude, dtype)).all())
    assert torch.equal(y[~touched], before[~touched])
    assert torch.equal(x, x_before)


def check_fused(
    kernels: Kernels, shape: tuple[int, int], parts: Sequence[tuple[int, int, Terms]], dtype: torch.dtype, *, bias: bool
) -> None:
    """`fused_linear` against products in float64 with merged weights; `parts` as for `check`, each with terms."""
    out, width = shape
    rows = sum(gap + size for gap, size, _ in parts) + 1
    rng = np.random.default_rng(rows)
    device = device_of(kernels)
    x = torch.from_numpy(rng.standard_normal((rows, width))).to(device, dtype)
    weight = torch.from_numpy(rng.standard_normal(shape) * 0.1).to(device, dtype)
    added = torch.from_numpy(rng.standard_normal(out)).to(device, dtype) if bias else None
    y = torch.full((rows, out), 777.0, device=device, dtype=dtype)
    untouched = torch.ones(rows, dtype=torch.bool, device=device)
    groups, stop, before = [], 0, weight.clone()
    for gap, size, terms in parts:
        start, stop = stop + gap, stop + gap + size
        untouched[start:stop] = False
        groups.append(
            Group(start, stop, tuple((factor, pack(delta, device, kernels.lanes)) for factor, delta in terms))
        )
    kernels.fused_linear(y, x, weight, added, groups)
    for group, (_, _, terms) in zip(groups, parts, strict=True):
        merged = merge_tensor_reference(weight.cpu(), [(factor, pack(delta, CPU)) for factor, delta in terms])
        moved, own = merged.to(device).double(), x[group.start : group.stop].double()
        shift = 0 if added is None else added.double()
        magnitude = own.abs() @ moved.abs().T + abs(shift)
        error = (y[group.start : group.stop].double() - (own @ moved.T + shift)).abs()
        assert bool((error <= allowed(magnitude, dtype)).all())
    assert bool((y[untouched] == 777).all())
    assert torch.equal(weight, before)


def check_merge(kernels: Kernels, shape: tuple[int, int], terms: Terms, dtype: torch.dtype, odd: float) -> None:
    """`merge` against the reference, bit for bit; `odd` is one of the pristine weights."""
    device = device_of(kernels)
    pristine = torch.randn(shape, generator=torch.Generator().manual_seed(shape[0])).to(device, dtype)
    pristine[0, 0] = odd
    before, out = pristine.clone(), torch.full_like(pristine, 7)
    kernels.merge(out, pristine, [(weight, pack(delta, device, kernels.lanes)) for weight, delta in terms])
    expected = merge_tensor_reference(pristine.cpu(), [(weight, pack(delta, CPU)) for weight, delta in terms])
    torch.testing.assert_close(out.cpu(), expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(pristine, before, rtol=0, atol=0, equal_nan=True)


def stored(delta: SparseDelta, *, grouped: bool = False) -> PackedTernary:
    """A delta with a nonzero as an expert file holds it."""
    nnz, numel = len(delta.indices), int(np.prod(delta.shape))
    if np.abs(delta.levels.astype(int)).max() > 1:
        return PackedLevels(delta.shape, nnz, delta.scale, encode_levels(delta.indices, delta.levels, numel))
    encode = (lambda *given: encode_in_groups(*given, 16)) if grouped else encode_smallest
    return PackedTernary(delta.shape, nnz, delta.scale, encode(delta.indices, delta.levels, numel))


def check_transcode(kernels: Kernels, tensor: PackedTernary) -> None:
    """`transcode` against decoding and packing, bit for bit."""
    expected = pack(tensor.decode("t"), CPU, kernels.lanes, kernels.lists_below)
    assert same(kernels.transcode("t", tensor, device_of(kernels)), expected)


def same(made: PackedDelta, expected: PackedDelta) -> bool:
    """Whether two packed deltas are equal bit for bit."""
    names = {
        BitPlanes: ("words",),
        SparseRows: ("order", "starts", "entries", "levels"),
        ByteLists: ("places", "starts", "pieces", "entries", "levels"),
    }.get(type(made), ("values",))
    if type(made) is not type(expected) or made.shape != expected.shape:
        return False
    if any(getattr(made, name, None) != getattr(expected, name, None) for name in ("scale", "lanes")):
        return False
    pairs = ((getattr(made, name), getattr(expected, name)) for name in names)
    return all(
        ours is theirs
        if ours is None or theirs is None
        else ours.dtype is theirs.dtype and torch.equal(ours.cpu(), theirs.cpu())
        for ours, theirs in pairs
    )
