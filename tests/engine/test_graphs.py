"""Decode steps over fixed tensors say what ordinary steps say, whatever was in the tensors before."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.engine.attention import AttentionBatch
from server.engine.expert import DecodedExpert
from server.engine.graphs import (
    Capture,
    DecodeGraphs,
    GraphCapture,
    Step,
    decode_graphs,
    eagerly,
    lacks_memory,
    padded_rows,
    padded_width,
)
from server.engine.host_tier import HostTier
from server.engine.kernels import Kernels, backend
from server.engine.kv_cache import NULL_BLOCK, KVCache
from server.engine.layout import Layout, lay_out
from server.engine.loader import ExpertLoader
from server.engine.merged import MergedWeights
from server.engine.model import BaseModel
from server.engine.options import CudaGraphs, Mode
from server.engine.scheduler import Work
from server.engine.sequence import Sequence
from server.engine.types import EngineRequest, SamplingParams
from store.mix import BASE_MIX, Mix
from tests.engine.conftest import SETTINGS, Library, collect, running
from tests.engine.replaying import replayed
from tests.tiny import save_base

CPU = torch.device("cpu")
MAX_BATCH = 11
BLOCKS = 80


class World:
    """A base, three experts that move everything and the weights in merged mode."""

    def __init__(self, folder: Path, architecture: str, device: torch.device = CPU) -> None:
        self.device = device
        self.library = Library(save_base(folder / "base", architecture), folder)
        self.model = BaseModel(self.library.base, dtype=torch.float32, device=device, feature_layer=1, cache_dir=None)
        self.merged = MergedWeights(self.model.parameters, backend("auto", device))
        loader = ExpertLoader(self.model.manifest, device, self.library.read, HostTier(0))
        digests = [self.library.add(seed, density=density) for seed, density in ((1, 0.3), (2, 0.02), (3, 0.3))]
        self.experts: dict[str, DecodedExpert] = {digest: loader.load(digest) for digest in digests}
        self.mixes = [BASE_MIX, *(Mix.of({digest: 1.0}) for digest in digests)]
        self.seen: list[Step] = []

    def noting(self, capture: Capture) -> Capture:
        """The same, and `seen` gets what it makes."""

        def noted(step: Step) -> Step:
            self.seen.append(capture(step))
            return self.seen[-1]

        self.seen.clear()
        return noted


@pytest.fixture(scope="module", params=["llama", "qwen2", "gemma3"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"), request.param)


class Twins:
    """The same sequences over two caches: ordinary steps on one of them, steps over fixed tensors on the other."""

    def __init__(self, world: World, prompts: list[list[int]], capture: Capture) -> None:
        self.world = world
        shape = world.model.kv_shape
        self.caches = [KVCache(shape, BLOCKS * shape.block_bytes, world.device) for _ in range(2)]
        self.graphs = DecodeGraphs(world.model, self.caches[1], MAX_BATCH, capture)
        self.pairs = [[self._begun(prompt, cache) for cache in self.caches] for prompt in prompts]

    def _begun(self, prompt: list[int], cache: KVCache) -> Sequence:
        """All but the last token is in the cache."""
        sequence = Sequence(EngineRequest(tuple(prompt), SamplingParams(64)), 64, emit=lambda _: None)
        assert cache.grow(sequence, len(prompt))
        if len(prompt) > 1:
            layout = lay_out([Work(sequence, len(prompt) - 1)])
            batch = AttentionBatch(layout.segments, cache, self.world.device)
            self.world.model.forward(layout.tokens, batch, [])
            sequence.computed = len(prompt) - 1
        return sequence

    def layouts(self, places: list[int]) -> list[Layout]:
        return [lay_out([Work(self.pairs[place][side], 1) for place in places]) for side in range(2)]

    def step(self, places: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """The logits of both; the sequences go on with a token of the ordinary ones."""
        plain, fixed = self.layouts(places)
        batch = AttentionBatch(plain.segments, self.caches[0], self.world.device)
        expected = self.world.model.forward(plain.tokens, batch, plain.logit_rows)
        got = self.graphs.run(fixed, self.world.merged.moved)
        assert got is not None
        got = got.clone()
        for place, row in zip(places, expected, strict=True):
            for sequence, cache in zip(self.pairs[place], self.caches, strict=True):
                sequence.computed += 1
                sequence.tokens.append(int(row.argmax()))
                assert cache.grow(sequence, len(sequence.tokens))
        return expected, got

    def check_caches(self) -> None:
        """They hold the same, and padding rows have left nothing where anybody reads."""
        scratch = self.caches[0].scratch_slot
        for one, other in zip(*(cache.keys + cache.values for cache in self.caches), strict=True):
            one, other = one.flatten(0, 1)[:scratch], other.flatten(0, 1)[:scratch]
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
        for layer in self.caches[1].keys + self.caches[1].values:
            assert not layer[NULL_BLOCK].any()


def check_steps(world: World, prompts: list[list[int]], steps: list[tuple[set[int], int]], capture: Capture) -> None:
    twins = Twins(world, prompts, capture)
    try:
        for chosen, mix in steps:
            places = sorted({place % len(prompts) for place in chosen})
            world.merged.apply(world.mixes[mix], world.experts)
            expected, got = twins.step(places)
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
            assert torch.equal(got.argmax(dim=1), expected.argmax(dim=1))
        twins.check_caches()
        assert twins.graphs.replays == len(steps)
        assert twins.graphs.captures <= len(steps)
    finally:
        world.merged.apply(BASE_MIX, {})


prompts = st.lists(st.lists(st.integers(0, 255), min_size=1, max_size=70), min_size=1, max_size=MAX_BATCH)
steps = st.lists(
    st.tuples(st.sets(st.integers(0, MAX_BATCH - 1), min_size=1), st.integers(0, 3)), min_size=1, max_size=4
)
unhurried = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@given(prompts=prompts, steps=steps)
@unhurried
def test_fixed_tensors_say_what_ordinary_steps_say(
    world: World, prompts: list[list[int]], steps: list[tuple[set[int], int]]
) -> None:
    """Batches of any size and lengths, on the base and on experts merged one after the other."""
    check_steps(world, prompts, steps, eagerly)


@given(prompts=prompts, steps=steps)
@unhurried
def test_a_step_done_again_on_its_tensors_says_what_ordinary_steps_say(
    world: World, prompts: list[list[int]], steps: list[tuple[set[int], int]]
) -> None:
    """As a CUDA graph would: only the first step of a shape is run, of the others the operations on tensors alone."""
    check_steps(world, prompts, steps, replayed)


@pytest.mark.gpu
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_a_graph_says_what_ordinary_steps_say(tmp_path: Path, architecture: str) -> None:
    device = torch.device("cuda")
    world = World(tmp_path, architecture, device)
    prompts = [[(7 * k + 31 * j) % 256 for k in range(1 + 9 * j)] for j in range(MAX_BATCH)]
    steps = [(set(range(MAX_BATCH)), 0), ({0, 4, 9}, 1), (set(range(MAX_BATCH)), 0), ({1, 2, 3}, 2), ({0, 1, 5}, 3)]
    check_steps(world, prompts, steps, GraphCapture(device))


def test_one_capture_serves_all_steps_of_a_shape(world: World) -> None:
    """Three to four rows share one, whoever they are; the base and merged experts do not; experts do."""
    twins = Twins(world, [[5, 6, 7], [1], [2] * 20, [3] * 40, [9, 9]], world.noting(replayed))
    addresses = set()
    for places in ([0, 1, 2], [1, 2, 3, 4], [4, 0, 3]):
        twins.step(places)
        (captured,) = twins.graphs._captured.values()
        inputs = captured.inputs
        held = (inputs.ids, inputs.positions, inputs.slots, inputs.lengths, inputs.table, twins.graphs._logits)
        addresses.add(tuple(tensor.data_ptr() for tensor in held))
    assert (len(addresses), len(world.seen)) == (1, 1)
    for mix, captures in zip([1, 2, 3, 0], [2, 2, 2, 2], strict=True):
        world.merged.apply(world.mixes[mix], world.experts)
        twins.step([0, 1, 2])
        assert len(world.seen) == captures
    twins.step([0, 1])
    assert len(world.seen) == 3


@pytest.mark.anyio
async def test_an_engine_answers_through_graphs(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    """Base and merged experts, in turns, while sequences come and go; prompts and their likelihoods beside them."""
    made: list[DecodeGraphs] = []

    def graphs(wanted: CudaGraphs, model: BaseModel, cache: KVCache, max_batch: int, _kernels: Kernels) -> DecodeGraphs:
        assert wanted is CudaGraphs.AUTO
        made.append(DecodeGraphs(model, cache, max_batch, replayed))
        return made[0]

    monkeypatch.setattr("server.engine.worker.decode_graphs", graphs)
    mixes = [BASE_MIX, *(Mix.of({library.add(seed): 1.0}) for seed in (1, 2))]
    asked = [(mixes[j % 3], [(7 * k + 31 * j) % 256 for k in range(1 + 5 * j)]) for j in range(6)]
    async with running(library, replace(SETTINGS, mode=Mode.MERGED)) as engine:
        scoring = collect(engine, [1, 2, 3], mixes[1], prompt_logprobs=1)
        answers = await asyncio.gather(*(collect(engine, prompt, mix) for mix, prompt in asked), scoring)
        counts = (await engine.inspect())["decode_graphs"]
    for (mix, prompt), (tokens, _) in zip(asked, answers, strict=False):
        assert tokens == library.greedy(mix, prompt, 12)
    assert counts["replays"] > counts["captures"] >= 2
    assert counts == made[0].counts()


def test_what_is_no_decode_step_is_left_alone(world: World) -> None:
    twins = Twins(world, [[5, 6, 7], [1] * 5], eagerly)
    one, other = (pair[1] for pair in twins.pairs)
    other.computed = 2
    for work in ([Work(other, 3)], [Work(one, 1), Work(other, 3)], [Work(other, 1)], [Work(one, 1), Work(other, 1)]):
        assert twins.graphs.run(lay_out(work), frozenset()) is None
    asks = EngineRequest((4, 5), SamplingParams(4, prompt_logprobs=2))
    scored = Sequence(asks, 4, emit=lambda _: None)
    assert twins.caches[1].grow(scored, 2)
    assert twins.graphs.run(lay_out([Work(scored, 2)]), frozenset()) is None
    crowd = [Work(one, 1)] * (MAX_BATCH + 1)
    assert twins.graphs.run(lay_out(crowd), frozenset()) is None
    assert twins.graphs.run(lay_out(crowd[1:]), frozenset()) is not None


def test_what_cannot_be_captured_runs_as_ever(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """It is said once, and nobody tries again."""
    tries = []

    def fails(step: Step) -> Step:
        tries.append(step)
        raise RuntimeError("operation not permitted when stream is capturing")

    twins = Twins(world, [[5, 6, 7]], fails)
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            assert twins.graphs.run(twins.layouts([0])[1], frozenset()) is None
    assert len(tries) == 1
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert "could not be captured" in caplog.text


def test_where_memory_is_missing_a_graph_is_tried_again_later(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """After 16 steps without one, then after 32; what has a graph keeps it meanwhile, and once there is memory all is
    as it was."""
    tries: list[Step] = []
    missing = False

    def capture(step: Step) -> Step:
        tries.append(step)
        if missing:
            raise torch.OutOfMemoryError("no room")
        return step

    twins = Twins(world, [[5, 6, 7], [1] * 5, [2] * 4], capture)
    (_, alone), (_, pair), (_, all_) = (twins.layouts(places) for places in ([0], [0, 1], [0, 1, 2]))

    def ran(layout: Layout) -> bool:
        return twins.graphs.run(layout, frozenset()) is not None

    assert ran(alone)
    missing = True
    for rest in (16, 32):
        before = len(tries)
        assert not any(ran(pair) for _ in range(1 + rest))
        assert len(tries) == before + 1
        assert ran(alone)
    missing = False
    assert ran(pair)
    assert ran(pair)
    missing = True
    assert not any(ran(all_) for _ in range(1 + 16))
    missing = False
    assert ran(all_)
    assert {record.levelname for record in caplog.records} == {"WARNING"}
    assert len(caplog.records) == 3


def test_where_memory_is_missing_for_the_tensors_of_a_step_it_runs_as_ever(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*given: object) -> None:
        raise torch.OutOfMemoryError("no room")

    twins = Twins(world, [[5, 6, 7]], eagerly)
    with monkeypatch.context() as patch:
        patch.setattr("server.engine.graphs.StepInputs", full)
        assert twins.graphs.run(twins.layouts([0])[1], frozenset()) is None
    for _ in range(16):
        assert twins.graphs.run(twins.layouts([0])[1], frozenset()) is None
    assert twins.graphs.run(twins.layouts([0])[1], frozenset()) is not None


def test_a_lack_of_memory_is_known_by_its_names_and_behind_what_follows_from_it() -> None:
    def fails_twice() -> None:
        try:
            raise torch.OutOfMemoryError("no room")
        finally:
            raise RuntimeError("the capture could not end")

    with pytest.raises(RuntimeError, match="could not end") as caught:
        fails_twice()
    assert lacks_memory(caught.value)
    for said in ("CUDA error: out of memory", "CUDA: CUDA_ERROR_OUT_OF_MEMORY", "CUBLAS_STATUS_ALLOC_FAILED"):
        assert lacks_memory(RuntimeError(said))
    assert not lacks_memory(RuntimeError("operation not permitted when stream is capturing"))


def test_a_value_of_the_step_that_goes_to_the_host_is_noticed() -> None:
    """The stand-in for graphs refuses what a graph refuses."""

    def step() -> None:
        assert torch.ones(1).sum() > 0

    with pytest.raises(AssertionError, match="went back to the host"):
        replayed(step)


def test_there_are_graphs_on_gpus_alone(world: World) -> None:
    cache = KVCache(world.model.kv_shape, BLOCKS * world.model.kv_shape.block_bytes, CPU)
    assert decode_graphs(CudaGraphs.AUTO, world.model, cache, MAX_BATCH, backend("auto", CPU)) is None
    assert decode_graphs(CudaGraphs.OFF, world.model, cache, MAX_BATCH, backend("auto", CPU)) is None


def test_shapes_are_few() -> None:
    assert [padded_rows(count, 30) for count in range(1, 31)] == (
        [1, 2, 4, 4, 8, 8, 8, 8] + [16] * 8 + [24] * 8 + [30] * 6
    )
    assert {padded_width(blocks, 500) for blocks in range(1, 501)} == {16, 32, 64, 128, 256, 500}
    assert all(padded_width(blocks, 500) >= blocks for blocks in range(1, 501))
    assert padded_width(3, 5) == 5
