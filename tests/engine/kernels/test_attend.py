"""Attention of native steps against PyTorch in float64: single tokens, prompts in tiles, and both in one step."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.kernels import backend
from server.engine.kernels.cpu import CpuKernels
from server.engine.kv_cache import BLOCK_TOKENS
from server.engine.programs import ATTEND, DTYPES, RECORD

CPU = torch.device("cpu")
BLOCKS = 40
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.03}
"""With bfloat16 queries and weights may be rounded; values are of the size of 1, and weights add up to 1."""

Spans = list[tuple[int, int]]
"""Of each sequence, the tokens in the cache and those of the step."""


@pytest.fixture(scope="module")
def kernels() -> CpuKernels:
    made = backend("auto", CPU)
    if not isinstance(made, CpuKernels):
        pytest.skip("there is no C++ compiler")
    return made


def attended(
    kernels: CpuKernels, query: torch.Tensor, cache: torch.Tensor, places: tuple[Any, Any, Any], scale: float,
    *, window: int = 0, softcap: float = 0.0, threads: int = 2,
) -> torch.Tensor:  # fmt: skip
    """Args:
    query: `[rows, heads, size]`.
    cache: keys and values, `[2, slots, key heads, size]`.
    places: positions, sequences and block tables.
    """
    (rows, heads, size), kv_heads = query.shape, cache.shape[2]
    found = torch.full_like(query, torch.nan)
    record = np.zeros(1, RECORD)
    fields = {
        "kind": ATTEND, "waits": 1, "rows": rows, "in": query.data_ptr(), "out": found.data_ptr(),
        "dtype": DTYPES[cache.dtype], "eps": scale, "plus": softcap, "keys": cache[0].data_ptr(),
        "values": cache[1].data_ptr(), "heads": heads, "kv_heads": kv_heads, "head_size": size, "window": window,
    }  # fmt: skip
    for name, value in fields.items():
        record[name] = value
    positions, sequences, tables = places
    kernels.step(record, positions, positions, sequences, tables, threads)
    return found


def attend(
    kernels: CpuKernels, spans: Spans, heads: int, kv_heads: int, size: int, dtype: torch.dtype,
    *, window: int = 0, softcap: float = 0.0, threads: int = 2,
) -> None:  # fmt: skip
    """What is not in a sequence's past is not a number, so that nobody reads it unnoticed."""
    rng = torch.Generator().manual_seed(sum(context + 7 * rows for context, rows in spans) + size)
    total = sum(rows for _, rows in spans)
    free = torch.randperm(BLOCKS, generator=rng).tolist()
    cache = torch.full((2, BLOCKS * BLOCK_TOKENS, kv_heads, size), torch.nan, dtype=dtype)
    query = torch.randn(total, heads, size, generator=rng)
    expected, first = torch.empty(total, heads, size, dtype=torch.float64), 0
    tables = np.zeros((len(spans), max(-(-(c + r) // BLOCK_TOKENS) for c, r in spans)), np.int32)
    for i, (context, rows) in enumerate(spans):
        length = context + rows
        own = [free.pop() for _ in range(-(-length // BLOCK_TOKENS))]
        tables[i, : len(own)] = own
        slots = [own[t // BLOCK_TOKENS] * BLOCK_TOKENS + t % BLOCK_TOKENS for t in range(length)]
        cache[:, slots] = torch.randn(2, length, kv_heads, size, generator=rng).to(dtype)
        keys, values = cache[:, slots].double().repeat_interleave(heads // kv_heads, 2)
        scores = torch.einsum("rhd,thd->rht", query[first : first + rows].double(), keys) / math.sqrt(size)
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        at, token = torch.arange(context, length)[:, None], torch.arange(length)[None]
        seen = (token <= at) & (token > at - (window or length))
        weights = scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1)
        expected[first : first + rows] = torch.einsum("rht,thd->rhd", weights, values)
        first += rows
    positions = np.array([p for context, rows in spans for p in range(context, context + rows)], np.int64)
    sequences = np.array([i for i, (_, rows) in enumerate(spans) for _ in range(rows)], np.int64)
    places = positions, sequences, tables
    found = attended(
        kernels, query, cache, places, 1 / math.sqrt(size), window=window, softcap=softcap, threads=threads
    )
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=TOLERANCE[dtype])


@settings(max_examples=60, deadline=None)
@given(data=st.data(), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_any_step_attends_as_pytorch_does(kernels: CpuKernels, data: st.DataObject, dtype: torch.dtype) -> None:
    spans = data.draw(st.lists(st.tuples(st.integers(0, 90), st.integers(1, 40)), min_size=1, max_size=4))
    kv_heads, group = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 5))
    size = data.draw(st.sampled_from([12, 32, 64, 80, 96, 160]))
    window, softcap = data.draw(st.sampled_from([0, 1, 15, 16, 33, 70])), data.draw(st.sampled_from([0.0, 2.0]))
    threads = data.draw(st.integers(1, 5))
    attend(kernels, spans, kv_heads * group, kv_heads, size, dtype, window=window, softcap=softcap, threads=threads)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rows", [1, 3, 4, 16, 17, 64, 250])
@pytest.mark.parametrize("context", [0, 1, 31, 32, 300])
def test_prompts_of_every_length(kernels: CpuKernels, context: int, rows: int, dtype: torch.dtype) -> None:
    """Among others: a single token before, a prompt after."""
    spans = [(5, 1), (context, rows)]
    attend(kernels, spans, 9, 3, 64, dtype)
    attend(kernels, spans, 4, 1, 32, dtype, window=20)


def test_scores_that_are_far_apart(kernels: CpuKernels) -> None:
    """The largest of a query's scores is subtracted, of what it sees alone: later tokens may have far larger ones."""
    size = 64
    keys = torch.zeros(2, BLOCKS * BLOCK_TOKENS, 1, size, dtype=torch.bfloat16)
    tokens = torch.arange(48)
    keys[0, :48, 0, 0] = (tokens * 40).to(torch.bfloat16)
    keys[1, :48, 0, 0] = tokens.to(torch.bfloat16)
    query = torch.zeros(48, 1, size)
    query[:, 0, 0] = 8
    places = np.arange(48), np.zeros(48, np.int64), np.arange(3, dtype=np.int32)[None]
    found = attended(kernels, query, keys, places, 1.0)
    assert torch.equal(found[:, 0, 0].round(), tokens.float()), "each sees itself, the last and loudest of its past"
