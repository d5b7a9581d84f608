"""Attention of decode steps in Triton: as PyTorch has it, in the interpreter or on a GPU; and a compiler takes it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.attention import AttentionBatch, Decodes, Segment, copied, gathered, paged_attention
from server.engine.kv_cache import BLOCK_TOKENS, KVCache, KVShape
from server.engine.paged_kernels import attends_rightly, best_kernel, best_writer, writes_rightly
from tests.zygote import ROOT

triton = pytest.importorskip("triton", reason="triton is not installed")
ON_GPU = torch.cuda.is_available()
if not ON_GPU and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("TRITON_INTERPRET=1 was not set, and there is no GPU", allow_module_level=True)

from server.engine.gpu_attention import attends, fixed, for_device, store  # noqa: E402

DEVICE = torch.device("cuda" if ON_GPU else "cpu")
TILE = fixed(torch.float32, 1, 1, 64, False)["TILE"]
EDGES = (1, 2, BLOCK_TOKENS, BLOCK_TOKENS + 1, TILE - 1, TILE, TILE + 1, 3 * TILE, 5 * TILE + 7)
ROUNDING = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}
DTYPES = (torch.float16, torch.bfloat16) if ON_GPU else tuple(ROUNDING)


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    lengths = draw(st.lists(st.one_of(st.sampled_from(EDGES), st.integers(1, 6 * TILE)), min_size=1, max_size=4))
    return {
        "lengths": lengths + [1] * draw(st.integers(0, 2)),
        "kv_heads": draw(st.integers(1, 2)),
        "group": draw(st.sampled_from([1, 2, 3, 4, 7, 8, 17])),
        "head_dim": draw(st.sampled_from([8, 16, 64, 80, 96, 128, 256])),
        "window": draw(st.sampled_from([None, 1, 9, TILE, 3 * TILE + 5])),
        "softcap": draw(st.sampled_from([None, 1.5, 30.0])),
        "scaling": draw(st.sampled_from([None, 0.25])),
        "dtype": draw(st.sampled_from(DTYPES)),
        "wider": draw(st.sampled_from([0, 1, 30])),
        "processors": draw(st.integers(1, 24)),
    }


def check(case: dict[str, Any]) -> None:
    """Against `gathered` in full precision, from a cache that holds no number where nobody may look."""
    generator = torch.Generator().manual_seed(0)
    lengths, dtype, rows = torch.tensor(case["lengths"]), case["dtype"], len(case["lengths"])
    kv_heads, heads, head_dim = case["kv_heads"], case["kv_heads"] * case["group"], case["head_dim"]
    used = [-(-length // BLOCK_TOKENS) for length in case["lengths"]]
    order = 1 + torch.randperm(sum(used), generator=generator)
    table = torch.zeros(rows, max(used) + case["wider"], dtype=torch.int64)
    keys, values = (torch.full((sum(used) + 1, BLOCK_TOKENS, kv_heads, head_dim), torch.nan) for _ in range(2))
    for row, own in enumerate(order.split(used)):
        table[row, : len(own)] = own
        for cached in (keys, values):
            blocks = torch.full((len(own) * BLOCK_TOKENS, kv_heads, head_dim), torch.nan)
            length = case["lengths"][row]
            blocks[:length] = torch.randn(length, kv_heads, head_dim, generator=generator)
            cached[own] = blocks.view(-1, BLOCK_TOKENS, kv_heads, head_dim)
    query = torch.randn(rows, heads, head_dim, generator=generator).transpose(0, 1)
    options = case["scaling"], case["window"], case["softcap"]
    inputs = [tensor.to(DEVICE, dtype) for tensor in (query, keys, values)]
    decodes = Decodes(table.to(DEVICE), lengths.to(DEVICE))
    for _ in range(2):  # again, since programs count who has arrived, and have to begin at zero
        made = attends(case["processors"])(*inputs, decodes, *options)
    expected = gathered(*(t.cpu().float().nan_to_num(0.0) for t in inputs), Decodes(table, lengths), *options)
    assert made.shape == (rows, heads, head_dim)
    assert made.dtype == dtype
    torch.testing.assert_close(made.cpu().float(), expected, rtol=ROUNDING[dtype], atol=ROUNDING[dtype])


@settings(max_examples=40, deadline=None)
@given(case=cases())
def test_any_step_is_attended_as_pytorch_does(case: dict[str, Any]) -> None:
    check(case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("window", "processors"), [(None, 1), (None, 8), (300, 8)])
def test_long_contexts_are_cut_and_put_together_again(dtype: torch.dtype, window: int | None, processors: int) -> None:
    sizes = {"kv_heads": 1, "group": 4, "head_dim": 128, "softcap": None, "scaling": None, "wider": 60}
    check({"lengths": [2500, 1, 700], "window": window, "dtype": dtype, "processors": processors, **sizes})


@pytest.mark.filterwarnings("ignore:(All-NaN|invalid value):RuntimeWarning")
def test_a_broken_row_says_so_and_spoils_no_other() -> None:
    dtype = DTYPES[0]
    keys, values = torch.randn(2, 21, BLOCK_TOKENS, 2, 16).to(DEVICE, dtype)
    table = torch.arange(1, 21).view(2, 10).to(DEVICE)
    query = torch.randn(4, 2, 16).to(DEVICE, dtype)
    query[:, 1] = torch.nan
    made = for_device(DEVICE)(query, keys, values, Decodes(table, torch.tensor([160, 160], device=DEVICE)), *[None] * 3)
    assert made[0].isfinite().all()
    assert made[1].isnan().all()


@settings(max_examples=25, deadline=None)
@given(
    slots=st.lists(st.integers(0, 5 * BLOCK_TOKENS - 1), min_size=1, max_size=9, unique=True),
    kv_heads=st.integers(1, 5),
    head_dim=st.sampled_from([8, 64, 80, 256]),
    dtype=st.sampled_from(list(ROUNDING)),
    side_by_side=st.booleans(),
)
def test_rows_are_written_where_pytorch_puts_them(
    slots: list[int], kv_heads: int, head_dim: int, dtype: torch.dtype, side_by_side: bool
) -> None:
    new = torch.randn(2, len(slots), kv_heads, head_dim).to(DEVICE, dtype).transpose(1, 2)
    new = new if side_by_side else new.contiguous()
    caches = torch.randn(2, 5, BLOCK_TOKENS, kv_heads, head_dim).to(DEVICE, dtype)
    ours, expected = caches.clone(), caches.clone()
    where = torch.tensor(slots, device=DEVICE)
    store(*ours, *new, where)
    copied(*expected, *new, where)
    assert torch.equal(ours, expected)


def test_a_step_of_prompts_and_decodes_is_the_same_with_both_kernels() -> None:
    shape = KVShape(2, 2, 16, DTYPES[0])
    query, key, value = (torch.randn(1, heads, 12, 16).to(DEVICE, shape.dtype) for heads in (4, 2, 2))
    made = []
    for attend, write in ((None, None), (for_device(DEVICE), store)):
        cache = KVCache(shape, 32 * shape.block_bytes, DEVICE)
        cache.attend, cache.write = attend, write
        layer: Any = SimpleNamespace(layer_idx=1)
        context = [Segment(0, 12, 0, (3, 1)), Segment(0, 12, 12, (3, 1)), Segment(0, 12, 0, (5,))]
        for segment in context:
            paged_attention(layer, query, key, value, None, batch=AttentionBatch([segment], cache, DEVICE))
        mixed = [Segment(0, 1, 24, (3, 1)), Segment(1, 11, 0, (7,)), Segment(11, 12, 12, (5,))]
        batch = AttentionBatch(mixed, cache, DEVICE)
        made.append((paged_attention(layer, query, key, value, None, batch=batch)[0], cache.keys[1], cache.values[1]))
    for ours, expected in zip(*made, strict=True):
        torch.testing.assert_close(ours, expected, rtol=ROUNDING[shape.dtype], atol=ROUNDING[shape.dtype])


def test_they_pass_the_comparison_at_start_and_what_is_wrong_does_not() -> None:
    like, attend = torch.zeros(1, dtype=torch.bfloat16, device=DEVICE), for_device(DEVICE)
    assert attends_rightly(attend, 2, 6, 16, like, (2.0,))
    assert not attends_rightly(lambda *a: attend(*a[:-1], None), 2, 6, 16, like, (2.0,)), "scores are not capped"
    assert writes_rightly(store, 2, 16, like)
    assert not writes_rightly(lambda *a: store(*a[:-1], a[-1] ^ 1), 2, 16, like)


def test_a_compiler_for_hopper_takes_it_and_a_server_compiles_it_when_it_starts() -> None:
    if not (Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas").exists():
        pytest.skip("this triton carries no assembler for GPUs")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(ROOT / ".cache" / "triton")
    command = [sys.executable, "-m", "tests.engine.compile_attention"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout)
    for sizes, made in report["variants"].items():
        assert made["mma"], sizes
        assert made["spilled"] == 0, sizes
        assert made["shared"] <= 227 * 1024 // 3, f"{sizes}: three of them share a multiprocessor"
        assert made["wide copies"] >= 32, sizes
        assert made["narrow copies"] == 0, sizes
    assert report["again"] == {"attend_splits": 0, "store_rows": 0}


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128])
def test_a_gpu_without_libraries_uses_them(monkeypatch: pytest.MonkeyPatch, head_dim: int) -> None:
    monkeypatch.setattr("server.engine.paged_kernels._LIBRARIES", ())
    shape = KVShape(1, 8, head_dim, torch.bfloat16)
    cache = KVCache(shape, 8 * shape.block_bytes, DEVICE)
    kernel = best_kernel(cache, 32)
    assert kernel is not gathered
    assert attends_rightly(kernel, 8, 32, head_dim, cache.keys[0], (2.0,))
    assert best_writer(cache) is store


@pytest.mark.gpu
def test_a_captured_launch_reads_lengths_and_blocks_anew() -> None:
    keys, values = torch.randn(2, 300, BLOCK_TOKENS, 8, 128, device=DEVICE, dtype=torch.bfloat16)
    query = torch.randn(32, 4, 128, device=DEVICE, dtype=torch.bfloat16)
    table = torch.zeros(4, 256, dtype=torch.int64, device=DEVICE)
    lengths = torch.ones(4, dtype=torch.int64, device=DEVICE)
    attend = for_device(DEVICE)

    def step() -> torch.Tensor:
        decodes = Decodes(table, lengths)
        attend(query, keys, values, decodes, None, 100, None)
        return attend(query, keys, values, decodes, None, None, None)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = step()
    for longest in (1, 70, 4096, 900):
        table.copy_(torch.randint(0, 300, table.shape))
        lengths.copy_(torch.tensor([longest, 1, 1 + longest // 2, max(1, longest - 3)]))
        graph.replay()
        expected = gathered(query, keys, values, Decodes(table, lengths), None, None, None)
        torch.testing.assert_close(made, expected, rtol=2e-2, atol=2e-2)
