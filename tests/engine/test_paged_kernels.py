"""Attention out of the paged cache by a library: used where it is right, and left where it is not."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch

from server.engine import paged_kernels
from server.engine.attention import Decodes, copied, gathered
from server.engine.kv_cache import KVCache, KVShape
from server.engine.paged_kernels import attends_rightly, best_kernel, best_writer, flash, writes_rightly

LIKE = torch.zeros(1)
SIZES = (2, 6, 8)
OWN = "server.engine.gpu_attention"


def with_kvcache(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, **options: Any) -> torch.Tensor:
    """What flash-attention documents of its function, in plain loops: no line is shared with the engine's own."""
    table = options["page_table"]
    assert table.dtype is options["cache_seqlens"].dtype is torch.int32
    assert options["causal"]
    left, right = options["window_size"]
    assert (left, right) == (-1, -1) or right == 0
    scale = q.shape[3] ** -0.5 if options["softmax_scale"] is None else options["softmax_scale"]
    cap, group = options["softcap"], q.shape[2] // k_cache.shape[2]
    out = torch.empty_like(q)
    for row, length in enumerate(options["cache_seqlens"].tolist()):
        keys, values = (
            torch.cat([cache[block] for block in table[row].tolist()])[:length] for cache in (k_cache, v_cache)
        )
        first = 0 if left < 0 else max(0, length - 1 - left)
        for head in range(q.shape[2]):
            scores = (keys[first:, head // group].float() @ q[row, 0, head].float()) * scale
            scores = cap * torch.tanh(scores / cap) if cap else scores
            out[row, 0, head] = (torch.softmax(scores, dim=0) @ values[first:, head // group].float()).to(q.dtype)
    return out


@pytest.mark.parametrize("window", [None, 1, 5, 40])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("scaling", [None, 0.4])
def test_the_librarys_function_is_called_by_its_own_terms(
    window: int | None, softcap: float | None, scaling: float | None
) -> None:
    keys, values = torch.randn(2, 5, 16, 2, 8)
    decodes = Decodes(torch.tensor([[4, 1], [2, 0], [3, 2]]), torch.tensor([20, 3, 32]))
    query = torch.randn(6, 3, 8)
    ours = flash(with_kvcache, "page_table")(query, keys, values, decodes, scaling, window, softcap)
    expected = gathered(query, keys, values, decodes, scaling, window, softcap)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_what_attends_otherwise_is_told_from_what_attends_rightly() -> None:
    assert attends_rightly(flash(with_kvcache, "page_table"), *SIZES, LIKE)

    def no_window(*tensors: torch.Tensor, **options: Any) -> torch.Tensor:
        return with_kvcache(*tensors, **{**options, "window_size": (-1, -1)})

    def one_short(*tensors: torch.Tensor, **options: Any) -> torch.Tensor:
        return with_kvcache(*tensors, **{**options, "cache_seqlens": (options["cache_seqlens"] - 1).clamp(min=1)})

    for wrong in (no_window, one_short):
        assert not attends_rightly(flash(wrong, "page_table"), *SIZES, LIKE)


class OnGpu:
    """A cache that says it lies on a GPU, for what is decided by that alone."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.shape = KVShape(1, SIZES[0], SIZES[2], dtype)
        self.keys = [_Like(torch.zeros(1, dtype=dtype))]


class _Like(torch.Tensor):
    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda")


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Modules by name, with the function that they have; none is installed but these."""
    functions: dict[str, Any] = {}

    def module(name: str) -> ModuleType:
        if name not in functions:
            raise ImportError(name)
        found = ModuleType(name)
        for function in ("flash_attn_with_kvcache", "for_device", "store"):
            setattr(found, function, functions[name])
        return found

    monkeypatch.setattr(paged_kernels, "import_module", module)
    right, like = attends_rightly, torch.zeros(1, dtype=torch.bfloat16)
    monkeypatch.setattr(
        paged_kernels,
        "attends_rightly",
        lambda kernel, kv, heads, dim, _, caps: right(kernel, kv, heads, dim, torch.zeros(1, dtype=like.dtype), caps),
    )
    right_writes = writes_rightly
    monkeypatch.setattr(
        paged_kernels,
        "writes_rightly",
        lambda write, kv, dim, _: right_writes(write, kv, dim, torch.zeros(1, dtype=like.dtype)),
    )
    return functions


def test_a_library_is_used_where_it_is_right_and_the_next_one_where_it_is_not(
    installed: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    cache: Any = OnGpu(torch.bfloat16)
    assert best_kernel(cache, SIZES[1]) is gathered, "none is installed"

    def wants_large_blocks(*_: object, **options: object) -> torch.Tensor:
        raise RuntimeError("Paged KV cache block size must be divisible by 256")

    installed["flash_attn"] = wants_large_blocks
    assert best_kernel(cache, SIZES[1]) is gathered
    assert "flash_attn is not used: Paged KV cache block size must be divisible by 256" in caplog.text
    installed["flash_attn_interface"] = with_kvcache
    assert best_kernel(cache, SIZES[1]) is not gathered
    installed["flash_attn_interface"] = lambda q, *_, **__: q
    assert best_kernel(cache, SIZES[1]) is gathered
    assert "flash_attn_interface is not used: it treats the paged cache otherwise" in caplog.text


def test_where_no_library_is_right_our_own_kernel_is_if_it_is(
    installed: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    cache: Any = OnGpu(torch.bfloat16)
    own = flash(with_kvcache, "page_table")
    installed[OWN] = lambda device: own
    assert best_kernel(cache, SIZES[1]) is own
    installed["flash_attn_interface"] = lambda q, *_, **__: q
    assert best_kernel(cache, SIZES[1]) is own
    installed["flash_attn_interface"] = with_kvcache
    assert best_kernel(cache, SIZES[1]) is not own, "a library goes first"
    del installed["flash_attn_interface"]
    installed[OWN] = lambda device: lambda *args: own(*args[:-1], None)
    assert best_kernel(cache, SIZES[1]) is gathered, "its scores are not capped"
    assert "the kernel in Triton is not used: it treats the paged cache otherwise" in caplog.text


def test_a_library_that_does_not_cap_scores_is_passed_over(
    installed: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Whether the model caps them is not known, and it is called with a cap if it does."""
    cache: Any = OnGpu(torch.bfloat16)
    installed["flash_attn"] = lambda *tensors, **options: with_kvcache(
        *tensors, **{**options, "page_table": options["block_table"], "softcap": 0.0}
    )
    assert best_kernel(cache, SIZES[1]) is gathered
    assert "flash_attn is not used: it treats the paged cache otherwise" in caplog.text
    installed[OWN] = lambda device: flash(with_kvcache, "page_table")
    assert best_kernel(cache, SIZES[1]) is not gathered


def test_keys_and_values_are_written_by_what_writes_rightly(installed: dict[str, Any]) -> None:
    cache: Any = OnGpu(torch.float32)
    assert best_writer(cache) is copied, "Triton is not installed"
    installed[OWN] = right = lambda *args: copied(*args)
    assert best_writer(cache) is right
    installed[OWN] = lambda *args: copied(*args[:-1], args[-1] ^ 1)
    assert best_writer(cache) is copied


def test_a_cpu_and_full_precision_gather(installed: dict[str, Any]) -> None:
    installed["flash_attn_interface"] = with_kvcache
    installed[OWN] = lambda device: flash(with_kvcache, "page_table")
    single: Any = OnGpu(torch.float32)
    assert best_kernel(single, SIZES[1]) is gathered
    shape = KVShape(1, SIZES[0], SIZES[2], torch.bfloat16)
    assert best_kernel(KVCache(shape, 4 * shape.block_bytes, torch.device("cpu")), SIZES[1]) is gathered
    assert best_writer(KVCache(shape, 4 * shape.block_bytes, torch.device("cpu"))) is copied
    assert "flash_attn_interface" not in sys.modules


@pytest.mark.gpu
def test_whatever_a_gpu_has_attends_rightly() -> None:
    shape = KVShape(1, 8, 128, torch.bfloat16)
    cache = KVCache(shape, 8 * shape.block_bytes, torch.device("cuda"))
    assert attends_rightly(best_kernel(cache, 32), 8, 32, 128, cache.keys[0])
