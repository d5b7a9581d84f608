"""Mixed mode at the level of logits: every row speaks with its own mix, on architectures of different shapes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from server.engine.attention import AttentionBatch, Segment
from server.engine.expert import DecodedExpert
from server.engine.host_tier import HostTier
from server.engine.kernels import backend
from server.engine.kernels.types import SparseRows
from server.engine.layout import Span
from server.engine.loader import ExpertLoader
from server.engine.mixed import MixedWeights
from server.engine.model import BaseModel
from server.engine.options import EngineSettings
from server.engine.sites import Kind, find_sites
from store.mix import BASE_MIX, Mix
from tests.engine.conftest import Library
from tests.tiny import save_base

CPU = torch.device("cpu")


class World:
    """A base of one architecture, three experts that move everything, and mixed mode over it."""

    def __init__(self, folder: Path, architecture: str, kernels: str = "reference") -> None:
        self.kernels = backend(kernels, CPU)
        self.library = Library(save_base(folder / "base", architecture), folder)
        self.model = BaseModel(self.library.base, dtype=torch.float32, device=CPU, feature_layer=1, cache_dir=None)
        self.sites, self.unserved = find_sites(self.model.network, self.model.parameters, self.model.try_out)
        self.mixed = MixedWeights(self.sites, self.unserved, self.model.parameters, self.kernels)
        self.digests = [self.library.add(seed, density=density) for seed, density in ((1, 0.3), (2, 0.02), (3, 0.3))]
        loader = ExpertLoader(self.model.manifest, CPU, self.library.read, HostTier(0))
        self.experts = {digest: loader.load(digest) for digest in self.digests}
        assert all(loader.decoded_bytes(digest) == expert.nbytes for digest, expert in self.experts.items())

    def logits(self, prompts: list[tuple[Mix, list[int]]], experts: dict[str, DecodedExpert]) -> torch.Tensor:
        """Next-token logits of prompts side by side in one step."""
        tokens: list[int] = []
        segments, spans, rows = [], [], []
        for mix, prompt in prompts:
            segments.append(Segment(len(tokens), len(tokens) + len(prompt), 0, ()))
            spans.append(Span(mix, len(tokens), len(tokens) + len(prompt)))
            tokens += prompt
            rows.append(len(tokens) - 1)
        heads = tuple(Span(mix, row, row + 1) for row, (mix, _) in enumerate(prompts))
        with self.mixed.carrying(tuple(spans), heads, experts):
            return self.model.forward(tokens, AttentionBatch(segments, None, CPU), rows)

    def prompts(self) -> list[tuple[Mix, list[int]]]:
        """Of five mixes, of 1, 4, 7, 10 and 13 tokens."""
        one, two, three = self.digests
        mixes = [
            BASE_MIX,
            Mix.of({one: 1.0}),
            Mix.of({two: 1.0}),
            Mix.of({one: 0.5, three: -0.7}),
            Mix.of({one: 1, two: 2, three: 1}),
        ]
        return [(mix, [(7 * k + 31 * j) % 256 for k in range(1 + 3 * j)]) for j, mix in enumerate(mixes)]

    def check(self, prompts: list[tuple[Mix, list[int]]]) -> None:
        """Side by side they say what their merged models say."""
        together = self.logits(prompts, self.experts)
        for row, (mix, prompt) in zip(together, prompts, strict=True):
            with torch.inference_mode():
                expected = self.library.merged(mix)(torch.tensor([prompt])).logits[0, -1]
            torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module", params=["llama", "qwen2", "gemma3"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"), request.param)


def test_every_parameter_is_served(world: World) -> None:
    assert world.unserved == set()
    assert {site.kind for site in world.sites} == set(Kind)
    assert [site.head for site in world.sites].count(True) == 1


def test_rows_of_different_mixes_equal_their_merged_models(world: World) -> None:
    prompts = world.prompts()
    for chosen in (prompts, prompts[:2], prompts[1:]):
        world.check(chosen)


def test_long_prompts_are_multiplied_with_moved_weights(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = products_with_moved_weights(world, monkeypatch)
    prompts = world.prompts()
    for chosen in (prompts, prompts[:3], prompts[2:]):
        world.check(chosen)
    assert set(sizes) == {7, 10, 13}, "not the rows of the two shorter prompts"


@pytest.fixture(scope="module")
def on_triton(tmp_path_factory: pytest.TempPathFactory) -> World:
    pytest.importorskip("triton", reason="triton is not installed")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("there is a GPU, which the tests of the engine do not use")
    return World(tmp_path_factory.mktemp("triton"), "llama", "triton")


def test_the_gpus_kernels_carry_a_model(on_triton: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world = on_triton
    sizes = products_with_moved_weights(world, monkeypatch)
    world.check(world.prompts()[:4])
    assert set(sizes) == {7, 10}
    one, two, _ = world.digests
    world.check([(Mix.of({two: 1.0}), [5]), (Mix.of({one: 0.5, two: 0.5}), [1, 2]), (BASE_MIX, [3])])
    assert set(sizes) == {7, 10}


def test_by_default_a_gpu_multiplies_long_prompts_with_weights_that_lists_move(
    on_triton: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many rows as a step has; with planes it takes more."""
    world, rows = on_triton, EngineSettings().step_tokens
    monkeypatch.setattr(world.kernels, "add_launches", lambda *_: None)
    sizes: list[int] = []
    monkeypatch.setattr(world.kernels, "fused_linear", lambda *given: sizes.extend(g.stop - g.start for g in given[-1]))
    planes, lists, _ = world.digests
    module = next(site.module for site in world.sites if site.kind is Kind.LINEAR and not site.head)
    for digest, expected in ((planes, []), (lists, [rows])):
        mix = Mix.of({digest: 1.0})
        with world.mixed.carrying((Span(mix, 0, rows),), (Span(mix, 0, 1),), world.experts):
            module(torch.zeros(1, rows, module.get_parameter("weight").shape[1]))
        assert sizes == expected
    world.mixed.forget()


def test_what_is_moved_for_one_layer_may_be_added_for_the_next(
    on_triton: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An expert of lists here and of planes there, with as many rows as is enough for lists alone."""
    world = on_triton
    planes, lists = (world.experts[digest].tensors for digest in world.digests[:2])
    tensors = {name: (lists if number % 2 else planes)[name] for number, name in enumerate(planes)}
    experts = {"both": DecodedExpert("both", tensors)}
    prompts = [(BASE_MIX, [1, 2]), (Mix.of({"both": 1.0}), [5, 6, 7, 8, 9, 10, 11])]
    sizes = products_with_moved_weights(world, monkeypatch)
    monkeypatch.setattr(world.kernels, "fuse_planes", 8)
    got = world.logits(prompts, experts)
    moved = sum(isinstance(delta, SparseRows) and "_proj" in name for name, delta in tensors.items())
    assert sizes == [7] * moved
    assert 0 < moved < sum("_proj" in name for name in tensors)
    reference = MixedWeights(world.sites, world.unserved, world.model.parameters, backend("reference", CPU))
    monkeypatch.setattr(world, "mixed", reference)
    torch.testing.assert_close(got, world.logits(prompts, experts), rtol=1e-4, atol=1e-4)


def products_with_moved_weights(world: World, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """From now on they are taken from 7 rows on; the rows of each group that was."""
    multiply, sizes = world.kernels.fused_linear, []

    def noted(*given: Any) -> None:
        sizes.extend(group.stop - group.start for group in given[-1])
        multiply(*given)

    for name in ("fuse_rows", "fuse_planes"):
        monkeypatch.setattr(world.kernels, name, 7, raising=False)
    monkeypatch.setattr(world.kernels, "fused_linear", noted)
    world.mixed.forget()
    return sizes


def test_a_step_leaves_nothing_behind(world: World) -> None:
    """Not even if it fails: the modules run as they were loaded, on the weights that were loaded."""
    before = {name: (p.data_ptr(), p.shape) for name, p in world.model.parameters.items()}
    plain = world.logits([(BASE_MIX, [1, 2, 3])], world.experts)
    mix = Mix.of({world.digests[0]: 1.0})
    with pytest.raises(RuntimeError), world.mixed.carrying((Span(mix, 0, 99),), (Span(mix, 0, 1),), world.experts):
        world.model.forward([1, 2, 3], AttentionBatch([Segment(0, 3, 0, ())], None, CPU), [2])
    assert all("forward" not in module.__dict__ for module in world.model.network.modules())
    assert {name: (p.data_ptr(), p.shape) for name, p in world.model.parameters.items()} == before
    assert torch.equal(world.logits([(BASE_MIX, [1, 2, 3])], world.experts), plain)


class Partial(nn.Module):
    """Some rows only, as a mixture of experts routes them, beside a layer that sees all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.all = nn.Linear(4, 4)
        self.some = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.scale = nn.Parameter(torch.ones(4))
        self.unused = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.all(x)) * self.scale + self.some(x[:, ::2]).sum()


def test_what_shows_no_axis_of_rows_is_no_site() -> None:
    network = Partial()
    parameters = dict(network.named_parameters())
    sites, unserved = find_sites(network, parameters, lambda rows, _: network(torch.randn(1, rows, 4)))
    assert [site.module for site in sites] == [network.all, network.norm]
    assert unserved == {"some.weight", "some.bias", "scale", "unused.weight", "unused.bias"}
    assert [site.broadcasts for site in sites] == [False, False], "layer_norm wants one weight for all rows"
