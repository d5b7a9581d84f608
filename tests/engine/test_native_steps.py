"""Steps as one native call say what the modules say: prompts and decodes, on the base, merged, and beside it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from server.engine.attention import AttentionBatch
from server.engine.costs import calibrate
from server.engine.executor import Executor
from server.engine.expert import DecodedExpert
from server.engine.host_tier import HostTier
from server.engine.kernels import backend
from server.engine.kernels.cpu import CpuKernels
from server.engine.kv_cache import KVCache
from server.engine.layout import Layout, lay_out
from server.engine.loader import ExpertLoader
from server.engine.model import BaseModel
from server.engine.native_steps import NativeSteps, native_steps
from server.engine.options import BaseWeights, NativeCalls
from server.engine.scheduler import Work
from server.engine.sequence import Sequence
from server.engine.types import EngineRequest, SamplingParams
from store.mix import BASE_MIX, Mix
from tests.engine.conftest import Library
from tests.tiny import save_base

CPU = torch.device("cpu")
BLOCKS = 120


@dataclass
class World:
    """A base, three experts that move everything, and the executor of each kind over caches of its own."""

    model: BaseModel
    kernels: CpuKernels
    experts: dict[str, DecodedExpert]
    mixes: list[Mix]

    def executors(self) -> list[tuple[Executor, KVCache]]:
        """Module by module, and natively."""
        shape = self.model.kv_shape
        caches = [KVCache(shape, BLOCKS * shape.block_bytes, CPU, reuse_prefixes=False) for _ in range(2)]
        fast = NativeSteps(self.model, caches[1], self.kernels)
        made = [
            Executor(self.model, cache, self.kernels, 0, one) for cache, one in zip(caches, (None, fast), strict=True)
        ]
        return list(zip(made, caches, strict=True))


@pytest.fixture(scope="module", params=["llama", "qwen2", "gemma3"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Steps as small as these are taken by several threads all the same."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("server.engine.native_steps._SMALL", 0)
        yield world_of(tmp_path_factory.mktemp("world"), request.param)


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> World:
    return world_of(tmp_path_factory.mktemp("halves"), "qwen2", torch.bfloat16)


def world_of(
    folder: Path,
    architecture: str,
    dtype: torch.dtype = torch.float32,
    weights: BaseWeights = BaseWeights.FULL,
) -> World:
    kernels = backend("auto", CPU)
    if not isinstance(kernels, CpuKernels):
        pytest.skip("there is no C++ compiler")
    library = Library(save_base(folder / "base", architecture), folder)
    model = BaseModel(library.base, dtype=dtype, device=CPU, feature_layer=1, cache_dir=None, weights=weights)
    loader = ExpertLoader(model.manifest, CPU, library.read, HostTier(0), transcode=kernels.transcode)
    digests = [library.add(seed, density=density) for seed, density in ((1, 0.3), (2, 0.02), (3, 0.3))]
    mixes = [BASE_MIX, *(Mix.of({d: 1.0}) for d in digests), Mix.of({digests[0]: 0.5, digests[1]: 0.7})]
    return World(model, kernels, {digest: loader.load(digest) for digest in digests}, mixes)


def run(executor: Executor, cache: KVCache, layout: Layout, world: World, *, mixed: bool) -> torch.Tensor:
    """The logits of a step."""
    if mixed:
        executor.merged.apply(BASE_MIX, {})
        terms = executor.mixed.terms(layout.spans, layout.logit_spans, world.experts)
        if executor.fast is not None:
            made = executor.fast.run(layout, executor.merged.moved, terms)
            assert made is not None
            return made.clone()
        with executor.mixed.carrying(layout.spans, layout.logit_spans, world.experts):
            return forward(world.model, cache, layout)
    executor.merged.apply(layout.spans[0].mix, world.experts)
    if executor.fast is not None:
        made = executor.fast.run(layout, executor.merged.moved)
        assert made is not None
        return made.clone()
    return forward(world.model, cache, layout)


def forward(model: BaseModel, cache: KVCache, layout: Layout) -> torch.Tensor:
    return model.forward(layout.tokens, AttentionBatch(layout.segments, cache, CPU), layout.logit_rows)


def sequence_of(prompt: list[int], mix: Mix, cache: KVCache) -> Sequence:
    sequence = Sequence(EngineRequest(tuple(prompt), SamplingParams(64), mix), 64, emit=lambda _: None)
    assert cache.grow(sequence, len(prompt))
    return sequence


def assert_near(made: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """All together, as a share of what is expected: in half precision a few are far from what they should be."""
    assert made.shape == expected.shape
    assert float((made - expected).norm()) <= tolerance * float(expected.norm())


def check(
    world: World, prompts: list[list[int]], mixes: list[int], chunk: int, *, mixed: bool, tolerance: float = 5e-4
) -> None:
    """Every prompt in chunks beside the others' next tokens, until each has got two; logits and caches are the same."""
    pairs = world.executors()
    try:
        own = [world.mixes[mixes[i % len(mixes)] if mixed else mixes[0]] for i in range(len(prompts))]
        order = sorted(range(len(prompts)), key=lambda i: (not own[i].is_base, own[i].digest))
        sides = [[sequence_of(prompts[i], own[i], cache) for i in order] for _, cache in pairs]
        for _ in range(40):
            waiting = [i for i, s in enumerate(sides[0]) if len(s.tokens) < len(prompts[order[i]]) + 2]
            if not waiting:
                break
            counts = {i: min(chunk, sides[0][i].pending) for i in waiting[: 128 // chunk]}
            layouts = [lay_out([Work(side[i], count) for i, count in counts.items()]) for side in sides]
            expected, made = (
                run(executor, cache, layout, world, mixed=mixed)
                for (executor, cache), layout in zip(pairs, layouts, strict=True)
            )
            assert_near(made, expected, tolerance)
            answers = iter(expected.argmax(dim=-1).tolist())
            for i, count in counts.items():
                samples = count == sides[0][i].pending
                token = next(answers) if samples else None
                for side, (_, cache) in zip(sides, pairs, strict=True):
                    side[i].computed += count
                    if token is not None:
                        side[i].tokens.append(token)
                    assert cache.grow(side[i], len(side[i].tokens))
        assert not waiting
        for one, other in zip(*(cache.keys + cache.values for _, cache in pairs), strict=True):
            assert_near(one[:BLOCKS].float(), other[:BLOCKS].float(), tolerance)
    finally:
        for executor, _ in pairs:
            executor.merged.apply(BASE_MIX, {})


prompts = st.lists(st.lists(st.integers(0, 255), min_size=1, max_size=50), min_size=1, max_size=7)
unhurried = settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@given(prompts=prompts, mix=st.integers(0, 4), chunk=st.integers(1, 64))
@unhurried
def test_merged_weights(world: World, prompts: list[list[int]], mix: int, chunk: int) -> None:
    """The base, an expert, or two of them."""
    check(world, prompts, [mix], chunk, mixed=False)


@given(prompts=prompts, mixes=st.lists(st.integers(0, 4), min_size=1, max_size=7), chunk=st.integers(1, 64))
@unhurried
def test_many_mixes_beside_the_base(world: World, prompts: list[list[int]], mixes: list[int], chunk: int) -> None:
    """Matrices, norms, biases and embeddings, of planes and lists, each row with its own mix."""
    check(world, prompts, mixes, chunk, mixed=True)


@pytest.mark.parametrize("mix", range(5))
@pytest.mark.parametrize("rows", [1, 3, 8, 20])
def test_half_precision(halves: World, mix: int, rows: int) -> None:
    """As near as rounding permits, with weights moved for prompts and deltas beside the products of few rows."""
    both = []
    for executor, cache in halves.executors():
        sequence = sequence_of(list(range(rows)), halves.mixes[mix], cache)
        both.append(run(executor, cache, lay_out([Work(sequence, rows)]), halves, mixed=True))
    assert_near(both[1], both[0], 0.15)


@pytest.mark.parametrize("weights", [BaseWeights.FULL, BaseWeights.INT8])
@pytest.mark.parametrize("rows", [[64], [130], [70, 3, 61], [3, 5, 90]])
def test_rows_that_threads_make_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: BaseWeights, rows: list[int]
) -> None:
    """As one thread makes them, of prompts on the base, on planes and on lists, whose weights are moved for some."""
    monkeypatch.setattr("server.engine.native_steps._SMALL", 0)
    world, before = world_of(tmp_path, "qwen2", torch.bfloat16, weights), torch.get_num_threads()
    for first in range(len(rows)):
        made = []
        for threads in (1, 3):
            _, (executor, cache) = world.executors()
            work = [
                Work(sequence_of([(7 * i) % 256 for i in range(count)], world.mixes[first + place], cache), count)
                for place, count in enumerate(rows)
            ]
            torch.set_num_threads(threads)
            try:
                made += [run(executor, cache, lay_out(work), world, mixed=True) for _ in range(3)]
            finally:
                torch.set_num_threads(before)
        for again in made[1:]:
            assert_near(again, made[0], 1e-5)


def test_deltas_are_priced_as_steps_apply_them(halves: World, monkeypatch: pytest.MonkeyPatch) -> None:
    ((_, _), (executor, _)) = halves.executors()
    assert isinstance(executor.fast, NativeSteps)
    monkeypatch.setattr("server.engine.costs._DELTA_SECONDS", 0.0)
    monkeypatch.setattr("server.engine.costs._STEP_SECONDS", 0.0)
    calibrate(halves.model, executor, halves.kernels, 32)
    assert executor.fast.steps == 12, "the base, planes and lists, of one row and of eight, twice each"


@pytest.mark.parametrize("weights", [BaseWeights.INT8, BaseWeights.INT4])
def test_a_base_in_integers(tmp_path: Path, weights: BaseWeights) -> None:
    """The same numbers as in the layers' own products, for experts beside them too; what is rounded to bfloat16 before
    a product may fall to the other side."""
    world = world_of(tmp_path, "llama", weights=weights)
    check(world, [[1, 2, 3], [4], list(range(30))], [0, 1, 4], 16, mixed=True, tolerance=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 3])
def test_any_number_of_threads_is_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, threads: int
) -> None:
    world = world_of(tmp_path, "gemma3", dtype)
    before = torch.get_num_threads()
    monkeypatch.setattr("server.engine.native_steps._SMALL", 0)
    torch.set_num_threads(threads)
    try:
        cache = KVCache(world.model.kv_shape, BLOCKS * world.model.kv_shape.block_bytes, CPU)
        assert native_steps(NativeCalls.AUTO, world.model, cache, world.kernels) is not None
        assert native_steps(NativeCalls.OFF, world.model, cache, world.kernels) is None
    finally:
        torch.set_num_threads(before)


def test_angles_of_later_positions_are_made_when_they_are_needed(tmp_path: Path) -> None:
    world = world_of(tmp_path, "llama")
    ((_, _), (executor, cache)) = world.executors()
    assert isinstance(executor.fast, NativeSteps)
    program = executor.fast._program
    assert not program.see(300)
    before = program.records()["cos"].copy()
    assert program.see(5000)
    assert (program.records()["cos"] != before).any()
    cos, _ = world.model.network.model.rotary_emb(torch.zeros(1), torch.tensor([[4999]]))  # type: ignore[union-attr, operator]
    assert torch.equal(program._angles[0].cos[4999], cos[0, 0])
    sequence = sequence_of([1, 2], BASE_MIX, cache)
    assert run(executor, cache, lay_out([Work(sequence, 2)]), world, mixed=False).isfinite().all()


class Scaled(nn.Module):
    """Half of what a layer says."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) / 2  # type: ignore[no-any-return]


class Halved(nn.Linear):
    """The same, with nothing to see from outside."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) / 2


def test_a_network_that_computes_something_else_is_run_by_its_modules(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whether that shows in its structure, or only in what comes out."""
    world = world_of(tmp_path, "llama")
    cache = KVCache(world.model.kv_shape, BLOCKS * world.model.kv_shape.block_bytes, CPU)
    layer = world.model.network.model.layers[1]  # type: ignore[union-attr, index]
    with caplog.at_level(logging.INFO, "server.engine.native_steps"):
        layer.mlp.down_proj.__class__ = Halved
        assert native_steps(NativeCalls.AUTO, world.model, cache, world.kernels) is None
        assert "what comes out differs" in caplog.text
        layer.mlp.down_proj.__class__ = nn.Linear
        layer.mlp.act_fn = nn.Tanh()
        assert native_steps(NativeCalls.AUTO, world.model, cache, world.kernels) is None
        assert "the activation Tanh is not known" in caplog.text
        layer.mlp.act_fn = nn.SiLU()
        layer.mlp.down_proj = Scaled(layer.mlp.down_proj)
        assert native_steps(NativeCalls.AUTO, world.model, cache, world.kernels) is None
        assert "Scaled is no linear layer" in caplog.text


@pytest.mark.parametrize("what", ["angles", "logits"])
def test_steps_read_nothing_that_is_gone_where_memory_runs_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Whichever part of a step's memory was to grow."""
    monkeypatch.setattr("server.engine.programs._FIRST_ANSWERS", 1)
    world = world_of(tmp_path, "llama")
    _, (executor, cache) = world.executors()
    fast = executor.fast
    assert isinstance(fast, NativeSteps)
    work = [Work(sequence_of([i, 2, 3], BASE_MIX, cache), 3) for i in range(2)]
    one, both = lay_out(work[:1]), lay_out(work)
    before = run(executor, cache, one, world, mixed=False)
    program = fast._program
    program._positions = 1  # as if it had to see more

    def full(*_: object, **__: object) -> torch.Tensor:
        raise MemoryError

    with monkeypatch.context() as patch:
        if what == "angles":
            patch.setattr(program, "_outline", replace(program._outline, rotaries=[full]))
        else:
            patch.setattr(torch, "zeros", full)
        with pytest.raises(MemoryError):
            run(executor, cache, both, world, mixed=False)
    known = {angles.cos.data_ptr() for angles in program._angles}
    assert known
    assert all(set(records["cos"].tolist()) - {0} <= known for records in [program._plain, *fast._records.values()])
    assert_near(run(executor, cache, one, world, mixed=False), before, 1e-6)
