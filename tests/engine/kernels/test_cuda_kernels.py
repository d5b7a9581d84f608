"""The kernels in CUDA C++, emulated on the CPU (`emulation.hpp`); `test_kernels` runs them on a GPU.

Where there is the compiler of PyTorch's CUDA wheels (`pip install cuda-bindings nvidia-cuda-nvrtc`; among the pins it
would keep torch for CUDA from bringing its own), it must take them too: what an emulation runs may be no program.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.kernels import Group, pack
from server.engine.kernels.build import BuildError
from server.engine.kernels.gpu_tables import Launch
from server.engine.kernels.merging import merge_tensor_reference
from server.engine.kernels.types import BitPlanes, SparseRows
from tests.engine.kernels.builders import sparse_delta
from tests.engine.kernels.comparing import CPU, Terms, allowed, check, check_fused, check_merge, odd_weights, terms_of

pytest.importorskip("triton", reason="triton is not installed")
if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("TRITON_INTERPRET=1 was not set, or there is a GPU", allow_module_level=True)

from server.engine.kernels.cuda_module import compiled
from server.engine.kernels.gpu import TritonKernels
from server.engine.kernels.gpu_cuda import SOURCES, TYPES, CudaKernels
from tests.engine.kernels.emulated import EmulatedModule

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KIB = 1 << 10
few = settings(max_examples=25, deadline=None)

Maker = Callable[[int], tuple[TritonKernels, list[EmulatedModule]]]
"""By bytes of shared memory: kernels, and their modules as they are made."""


@pytest.fixture(scope="module")
def maker(tmp_path_factory: pytest.TempPathFactory) -> Maker:
    folder = tmp_path_factory.mktemp("emulated")

    def make(shared: int) -> tuple[TritonKernels, list[EmulatedModule]]:
        modules: list[EmulatedModule] = []

        def module(dtype: torch.dtype, device: torch.device) -> EmulatedModule:
            modules.append(EmulatedModule(folder, dtype, shared))
            return modules[-1]

        return TritonKernels(CudaKernels(module)), modules

    try:
        for dtype in DTYPES:
            EmulatedModule(folder, dtype, KIB)
    except BuildError as error:
        if "no C++ compiler" in str(error) or "_Float16" in str(error):
            pytest.skip(f"cannot be emulated here: {error}")
        raise
    return make


@pytest.fixture(scope="module")
def kernels(maker: Maker) -> Iterator[TritonKernels]:
    """With what an H100 has."""
    made, modules = maker(227 * KIB)
    yield made
    names = {name for module in modules for name in module.launched}
    assert names >= {"add_lists_1", "add_lists_8", "add_levels_1", "add_levels_8", "merge_lists", "merge_planes"}


def lists(shape: tuple[int, int], density: float, top: int = 1) -> Terms:
    return [(0.75, sparse_delta(7, shape, density, top=top))]


@few
@given(data=st.data(), dtype=st.sampled_from(DTYPES))
def test_any_batch_equals_dense_matrices(kernels: TritonKernels, data: st.DataObject, dtype: torch.dtype) -> None:
    shape = data.draw(st.tuples(st.integers(1, 100), st.integers(1, 140)))
    part = st.tuples(st.integers(0, 2), st.integers(0, 20), terms_of(shape))
    check(kernels, shape, data.draw(st.lists(part, max_size=3)), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("top", [1, 5])
@pytest.mark.parametrize("rows", [1, 4, 5, 17, 33])
def test_groups_of_every_size(kernels: TritonKernels, rows: int, top: int, dtype: torch.dtype) -> None:
    """Long lists and short ones, of rows that vectors are read from."""
    shape = (96, 512)
    parts = [(1, rows, lists(shape, 0.09, top)), (0, 1, lists(shape, 0.01)), (2, 2, lists(shape, 0.05) * 2)]
    check(kernels, shape, parts, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "kib", "of_float32"), [(8, 15, 24), (4, 9, 14), (2, 6, 8), (1, 4, 5)])
def test_the_less_shared_memory_the_fewer_rows_at_a_time(
    maker: Maker, rows: int, kib: int, of_float32: int, dtype: torch.dtype
) -> None:
    """What two blocks of so many rows need, of 300 columns."""
    kernels, modules = maker(KIB * (of_float32 if dtype is torch.float32 else kib))
    check(kernels, (70, 300), [(0, 19, lists((70, 300), 0.05))], dtype)
    assert modules[0].launched == [f"add_lists_{rows}"]


def test_what_does_not_fit_is_left_to_triton(maker: Maker) -> None:
    kernels, modules = maker(4 * KIB)
    check(kernels, (40, 3000), [(0, 1, lists((40, 3000), 0.02))], torch.bfloat16)
    assert modules[0].launched == []


def test_terms_of_several_forms_are_summed_up_in_float32(kernels: TritonKernels) -> None:
    terms: Terms = [*lists((70, 90), 0.05), (0.5, sparse_delta(2, (70, 90), 0.4))]
    check(kernels, (70, 90), [(1, 3, terms), (0, 6, terms)], torch.bfloat16)


def test_chunks_without_rows_or_terms_leave_y_alone(kernels: TritonKernels) -> None:
    """Tables are padded with them."""
    table = torch.tensor([[3, 3, 0, 1], [0, 2, 1, 1]]).view(-1)
    y = torch.randn(4, 40)
    before = y.clone()
    kernels.add_launches(
        y, torch.randn(4, 60), [Launch(True, 16, 2, True, False, torch.cat([table, torch.zeros(8)]).long())]
    )
    assert torch.equal(y, before)


def test_many_weight_rows_are_shared_among_blocks(kernels: TritonKernels) -> None:
    """More than a block takes for each of several experts, and a last block that is not full."""
    shape = (1100, 33)
    check(kernels, shape, [(0, 1, lists(shape, 0.05)) for _ in range(3)], torch.bfloat16)


@pytest.mark.parametrize("offset", [1, 2, 3])
def test_entries_may_begin_anywhere(kernels: TritonKernels, offset: int) -> None:
    """Four entries are read at a time, from addresses that eight divides."""
    delta = pack(sparse_delta(3, (40, 200), 0.05, top=3), CPU)
    assert isinstance(delta, SparseRows)
    assert delta.levels is not None
    moved = torch.full((len(delta.entries) + offset,), 399, dtype=torch.int16)
    moved[offset:] = delta.entries
    x, y, expected = torch.randn(9, 200), torch.zeros(9, 40), torch.zeros(9, 40)
    kernels.add_linear(y, x, [Group(0, 9, ((1.0, replace(delta, entries=moved[offset:])),))])
    kernels.add_linear(expected, x, [Group(0, 9, ((1.0, delta),))])
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)  # the order of the sums is another


@pytest.mark.parametrize("odd", [float("inf"), float("nan")])
def test_a_row_that_is_not_finite_spoils_no_other(kernels: TritonKernels, odd: float) -> None:
    """Nor does it spoil a list that does not name its column, though places beside lists are multiplied, too."""
    delta = sparse_delta(5, (64, 90), 0.04)
    matrix = np.zeros((64, 90), np.float32)
    matrix.reshape(-1)[delta.indices] = delta.levels * np.float32(delta.scale)
    x = torch.randn(9, 90)
    x[4, 0] = x[4, 89] = odd
    y = torch.zeros(9, 64)
    kernels.add_linear(y, x, [Group(0, 9, ((1.0, pack(delta, CPU)),))])
    expected = x.double() @ torch.from_numpy(matrix).double().T
    named = torch.from_numpy(matrix[:, [0, 89]]).any(1)
    finite = x[4].nan_to_num(0, 0, 0).double() @ torch.from_numpy(matrix).double().T
    expected[4, ~named] = finite[~named]
    assert torch.equal(y[4].isfinite(), ~named)
    size = x.nan_to_num(0, 0, 0).double().abs() @ torch.from_numpy(matrix).double().abs().T
    inside = expected.isfinite()
    assert bool(((y.double() - expected).abs() <= allowed(size, torch.float32))[inside].all())


@few
@given(data=st.data(), dtype=st.sampled_from(DTYPES))
def test_merging_equals_the_reference_bit_for_bit(
    kernels: TritonKernels, data: st.DataObject, dtype: torch.dtype
) -> None:
    shape = data.draw(st.tuples(st.integers(1, 70), st.integers(1, 140)))
    check_merge(kernels, shape, data.draw(terms_of(shape).filter(bool)), dtype, data.draw(odd_weights))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1024, 2500, 3072])
@pytest.mark.parametrize("top", [1, 9])
def test_wide_rows_are_merged_piece_by_piece(kernels: TritonKernels, width: int, top: int, dtype: torch.dtype) -> None:
    check_merge(kernels, (37, width), lists((37, width), 0.06, top), dtype, 0.5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(70, 520), (33, 513), (1, 8), (64, 256)])
@pytest.mark.parametrize("offset", [0, 1])
def test_planes_are_merged_tile_by_tile(
    kernels: TritonKernels, shape: tuple[int, int], offset: int, dtype: torch.dtype
) -> None:
    """Rows that vectors are read from and rows that they are not, as memory that begins anywhere."""
    delta = pack(sparse_delta(4, shape, 0.4), CPU)
    assert isinstance(delta, BitPlanes)
    room = torch.full((2 * shape[0] * shape[1] + offset + 9,), torch.nan, dtype=dtype)
    out = room[offset : offset + shape[0] * shape[1]].view(shape)
    pristine = torch.randn(shape).to(dtype)
    kernels.merge(out, pristine, [(0.7, delta)])
    assert torch.equal(out, merge_tensor_reference(pristine, [(0.7, delta)]))
    assert room[:offset].isnan().all()
    assert room[offset + out.numel() :].isnan().all()


def test_slabs_are_moved_alone(kernels: TritonKernels, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows from the middle of a delta, for a product or among other forms."""
    monkeypatch.setattr("server.engine.kernels.gpu_moving.SLAB_BYTES", 4096)
    shape = (130, 24)
    many: Terms = [*lists(shape, 0.05), (0.3, sparse_delta(2, shape, 0.4))]
    check_fused(kernels, shape, [(0, 5, lists(shape, 0.05, 3)), (1, 2, many)], torch.bfloat16, bias=True)
    check_merge(kernels, shape, many, torch.bfloat16, 0.0)


@pytest.mark.parametrize("architecture", ["sm_75", "sm_80", "sm_90", "sm_120"])
def test_the_compiler_for_gpus_takes_them(architecture: str) -> None:
    pytest.importorskip("cuda.bindings.nvrtc", reason="cuda-bindings is not installed")
    for name in TYPES.values():
        assert len(compiled(SOURCES, (("TYPE", name),), architecture)) > 10_000


def test_what_does_not_compile_says_why(tmp_path: Path) -> None:
    pytest.importorskip("cuda.bindings.nvrtc", reason="cuda-bindings is not installed")
    path = tmp_path / "wrong.cu"
    path.write_text("this is no program")
    with pytest.raises(RuntimeError, match=r"wrong\.cu does not compile: .*wrong\.cu\(1\): error"):
        compiled((path,), (), "sm_90")
