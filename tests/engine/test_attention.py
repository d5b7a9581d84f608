"""The ragged, paged forward against transformers' own attention."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from server.engine.attention import AttentionBatch, Segment
from server.engine.kv_cache import KVCache
from server.engine.model import BaseModel
from server.engine.sequence import Sequence
from server.engine.types import EngineRequest
from store.errors import InvalidRequestError
from tests.tiny import save_base

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["llama", "qwen2", "gemma3"])
def models(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[BaseModel, torch.nn.Module]:
    folder = save_base(tmp_path_factory.mktemp("base"), request.param)
    ours = BaseModel(folder, dtype=torch.float32, device=CPU, feature_layer=2, cache_dir=None)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    return ours, reference


@given(
    prompts=st.lists(st.lists(st.integers(0, 255), min_size=1, max_size=40), min_size=1, max_size=4),
    chunk=st.integers(1, 17),
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_chunked_prefill_and_decode_equal_a_plain_forward(
    models: tuple[BaseModel, torch.nn.Module], prompts: list[list[int]], chunk: int
) -> None:
    """Sequences of unequal length advance side by side in chunks of any size, down to single tokens."""
    ours, reference = models
    cache = KVCache(ours.kv_shape, 64 * ours.kv_shape.block_bytes, CPU)
    sequences = [Sequence(EngineRequest(tuple(prompt)), 1, emit=lambda event: None) for prompt in prompts]
    last: dict[int, torch.Tensor] = {}
    while any(sequence.pending for sequence in sequences):
        tokens: list[int] = []
        segments: list[Segment] = []
        active = [sequence for sequence in sequences if sequence.pending]
        for sequence in active:
            count = min(chunk, sequence.pending)
            assert cache.grow(sequence, sequence.computed + count)
            start = len(tokens)
            tokens += sequence.tokens[sequence.computed : sequence.computed + count]
            segments.append(Segment(start, len(tokens), sequence.computed, tuple(sequence.blocks)))
            sequence.computed += count
        batch = AttentionBatch(segments, cache, CPU)
        logits = ours.forward(tokens, batch, [segment.stop - 1 for segment in segments])
        last.update({sequence.id: row for sequence, row in zip(active, logits, strict=True)})
    for sequence, prompt in zip(sequences, prompts, strict=True):
        with torch.inference_mode():
            expected = reference(input_ids=torch.tensor([prompt])).logits[0, -1]
        torch.testing.assert_close(last[sequence.id], expected, rtol=1e-4, atol=1e-4)


def test_features_are_mean_hidden_states_without_the_first_token(models: tuple[BaseModel, torch.nn.Module]) -> None:
    ours, reference = models
    prompts = [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], [7], [9, 9, 200]]
    features = ours.features(prompts)
    assert features.shape == (3, ours.hidden_size)
    for row, prompt in zip(features, prompts, strict=True):
        with torch.inference_mode():
            states = reference(input_ids=torch.tensor([prompt]), output_hidden_states=True).hidden_states[2][0]
        torch.testing.assert_close(row, states[min(1, len(prompt) - 1) :].mean(0), rtol=1e-4, atol=1e-4)


def test_a_shallow_base_gives_features_of_all_its_layers(tmp_path: Path) -> None:
    base = BaseModel(save_base(tmp_path), dtype=torch.float32, device=CPU, feature_layer=99, cache_dir=None)
    assert base.feature_layer == base.kv_shape.layers
    assert base.features([[1, 2, 3]]).shape == (1, base.hidden_size)


def test_a_freed_block_full_of_nan_does_not_reach_its_next_owner(models: tuple[BaseModel, torch.nn.Module]) -> None:
    ours, _ = models
    cache = KVCache(ours.kv_shape, 3 * ours.kv_shape.block_bytes, CPU)
    first = Sequence(EngineRequest((1,)), 1, emit=lambda event: None)
    assert cache.grow(first, 32)
    for keys, values in zip(cache.keys, cache.values, strict=True):
        keys[first.blocks] = float("nan")
        values[first.blocks] = float("nan")
    cache.release(first)
    second = Sequence(EngineRequest((1, 2)), 1, emit=lambda event: None)
    for position in range(2):
        assert cache.grow(second, position + 1)
        segment = Segment(0, 1, position, tuple(second.blocks))
        logits = ours.forward([position + 1], AttentionBatch([segment], cache, CPU), [0])
    assert logits.isfinite().all()


def test_the_cache_hands_out_and_takes_back_every_block(models: tuple[BaseModel, torch.nn.Module]) -> None:
    ours, _ = models
    cache = KVCache(ours.kv_shape, 5 * ours.kv_shape.block_bytes, CPU)
    one, two = (Sequence(EngineRequest((1,)), 1, emit=lambda event: None) for _ in range(2))
    assert cache.grow(one, 33)
    assert len(one.blocks) == 3
    assert not cache.grow(two, 17), "two blocks asked for, one is left"
    assert two.blocks == []
    assert cache.grow(two, 16)
    assert not set(one.blocks) & set(two.blocks)
    assert cache.used_bytes == cache.total_bytes
    cache.release(one)
    cache.release(two)
    assert cache.used_bytes == 0
    assert cache.free_blocks == cache.total_blocks


def test_a_budget_below_one_block_is_refused(models: tuple[BaseModel, torch.nn.Module]) -> None:
    with pytest.raises(InvalidRequestError, match="kv_bytes"):
        KVCache(models[0].kv_shape, 10, CPU)
