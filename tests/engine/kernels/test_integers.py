"""Products with integers: every path through the native code against the weights they mean, in double precision."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.kernels.build import BuildError
from server.engine.kernels.integers import (
    GROUP,
    IntegerKernels,
    pack_eight,
    pack_four,
    unpack_eight,
    unpack_four,
    weight_of_four,
)

MAKERS: dict[str, Callable[[Path], IntegerKernels]] = {
    "native": IntegerKernels,
    # The other widths, on any machine that has one of them.
    "one column at a time": lambda folder: IntegerKernels(folder, flags=("-O1", "-DPORTABLE")),
    "no AVX-512": lambda folder: IntegerKernels(folder, flags=("-O1", "-mno-avx512f")),
    "no AVX2": lambda folder: IntegerKernels(folder, flags=("-O1", "-mno-avx2")),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("integers")


@pytest.fixture(scope="module", params=list(MAKERS))
def kernels(request: pytest.FixtureRequest, folder: Path) -> IntegerKernels:
    try:
        return MAKERS[request.param](folder)
    except BuildError as error:
        pytest.skip(f"cannot be built here: {error}")


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def check(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, size: torch.Tensor) -> None:
    """Float32 sums of parts of that size are near the exact ones."""
    assert y.dtype is torch.float32
    assert y.shape == (len(x), len(weight))
    error = (y.double() - x.double() @ weight.T).abs()
    assert (error <= 2e-6 * (x.double().abs() @ size.T)).all()


def numbers(generator: torch.Generator, *shape: int) -> torch.Tensor:
    """Of sizes from 0.001 to 10."""
    return torch.randn(shape, generator=generator) * 10 ** (4 * torch.rand(shape, generator=generator) - 3)


outs = st.integers(1, 150)
batches = st.integers(1, 33)
seeds = st.integers(0, 1 << 30)
counts = st.integers(1, 5)


@settings(max_examples=60, deadline=None)
@given(out=outs, groups=st.integers(1, 9), rows=batches, threads=counts, seed=seeds)
def test_four_bits_are_levels_with_scale_and_offset_per_group(
    kernels: IntegerKernels, out: int, groups: int, rows: int, threads: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    torch.set_num_threads(threads)
    x = torch.randn(rows, groups * GROUP, generator=generator).bfloat16()
    levels = torch.randint(0, 16, (out, groups * GROUP), generator=generator, dtype=torch.uint8)
    scales = numbers(generator, groups, out, 2).bfloat16()
    scale, offset = scales.double().transpose(0, 1).repeat_interleave(GROUP, 1).unbind(2)
    weight, size = (levels.double() - 8) * scale + offset, 16 * scale.abs() + offset.abs()
    check(kernels.multiply_four(x, *pack_four(levels, scales), out), x, weight, size)
    assert ((weight_of_four(levels, scales) - weight).abs() <= 1e-6 * size).all()


@settings(max_examples=60, deadline=None)
@given(out=outs, eighths=st.integers(1, 36), rows=batches, threads=counts, seed=seeds)
def test_eight_bits_are_levels_with_a_scale_per_row(
    kernels: IntegerKernels, out: int, eighths: int, rows: int, threads: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    torch.set_num_threads(threads)
    x = torch.randn(rows, 8 * eighths, generator=generator).bfloat16()
    levels = torch.randint(-127, 128, (out, 8 * eighths), generator=generator, dtype=torch.int8)
    scales = numbers(generator, out).bfloat16()
    weight = levels.double() * scales.double()[:, None]
    check(kernels.multiply_eight(x, *pack_eight(levels, scales), out), x, weight, weight.abs())


@pytest.mark.parametrize("threads", [1, 3, 5])
@pytest.mark.parametrize(("rows", "out", "width"), [(1, 192, 576), (8, 576, 576), (20, 576, 1536), (1, 5000, 576)])
def test_shapes_of_a_model(kernels: IntegerKernels, rows: int, out: int, width: int, threads: int) -> None:
    """The last two are large enough for threads to share them."""
    generator = torch.Generator().manual_seed(rows)
    torch.set_num_threads(threads)
    x = torch.randn(rows, width, generator=generator).bfloat16()
    four = torch.randint(0, 16, (out, width), generator=generator, dtype=torch.uint8)
    groups, scales = numbers(generator, width // GROUP, out, 2).bfloat16(), numbers(generator, out).bfloat16()
    weight = weight_of_four(four, groups).double()
    size = groups.abs().double().transpose(0, 1) @ torch.tensor([16.0, 1.0], dtype=torch.float64)
    check(kernels.multiply_four(x, *pack_four(four, groups), out), x, weight, size.repeat_interleave(GROUP, 1))
    eight = torch.randint(-127, 128, (out, width), generator=generator, dtype=torch.int8)
    weight = eight.double() * scales.double()[:, None]
    check(kernels.multiply_eight(x, *pack_eight(eight, scales), out), x, weight, weight.abs())


def test_a_level_is_itself_whatever_its_place(kernels: IntegerKernels) -> None:
    """Every level at every column, one column at a time."""
    x = torch.eye(GROUP).bfloat16()
    four = (torch.arange(48)[:, None] + torch.arange(GROUP)).remainder(16).to(torch.uint8)
    groups = torch.tensor([1.0, 0.0]).bfloat16().expand(1, 48, 2)
    assert torch.equal(kernels.multiply_four(x, *pack_four(four, groups), 48), (four.float() - 8).T)
    eight = ((torch.arange(255)[:, None] + torch.arange(GROUP)).remainder(255) - 127).to(torch.int8)
    ones = torch.ones(255).bfloat16()
    assert torch.equal(kernels.multiply_eight(x, *pack_eight(eight, ones), 255), eight.float().T)


@settings(max_examples=30, deadline=None)
@given(out=outs, groups=st.integers(1, 5), seed=seeds)
def test_packing_loses_nothing(out: int, groups: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    four = torch.randint(0, 16, (out, groups * GROUP), generator=generator, dtype=torch.uint8)
    eight = torch.randint(-127, 128, (out, groups * GROUP), generator=generator, dtype=torch.int8)
    for levels, scales, pack, unpack in (
        (four, numbers(generator, groups, out, 2).bfloat16(), pack_four, unpack_four),
        (eight, numbers(generator, out).bfloat16(), pack_eight, unpack_eight),
    ):
        packed = pack(levels, scales)
        assert all(tensor.is_contiguous() for tensor in packed)
        assert all(torch.equal(a, b) for a, b in zip(unpack(*packed, out), (levels, scales), strict=True))


def test_what_does_not_fit_together_is_refused(kernels: IntegerKernels) -> None:
    nibbles, groups = pack_four(torch.zeros(40, 64, dtype=torch.uint8), torch.zeros(2, 40, 2).bfloat16())
    levels, scales = pack_eight(torch.zeros(40, 64, dtype=torch.int8), torch.zeros(40).bfloat16())
    x = torch.zeros(2, 64).bfloat16()
    for out in (32, 49):
        with pytest.raises(ValueError, match=f"are not {out} rows"):
            kernels.multiply_four(x, nibbles, groups, out)
        with pytest.raises(ValueError, match=f"are not {out} rows"):
            kernels.multiply_eight(x, levels, scales, out)
    for wrong in (x.float(), x[:, :32], x[0]):
        with pytest.raises(ValueError, match="must be"):
            kernels.multiply_four(wrong, nibbles, groups, 40)
        with pytest.raises(ValueError, match="must be"):
            kernels.multiply_eight(wrong, levels, scales, 40)
    with pytest.raises(ValueError, match="contiguous"):
        kernels.multiply_eight(x, levels.flip(0).transpose(2, 3).contiguous().transpose(2, 3), scales, 40)
    assert kernels.multiply_four(x[:0], nibbles, groups, 40).shape == (0, 40)
    strided = torch.zeros(2, 128).bfloat16()[:, ::2]
    assert torch.equal(kernels.multiply_four(strided, nibbles, groups, 40), torch.zeros(2, 40))
