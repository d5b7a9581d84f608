"""Steps with experts beside the base, over fixed tensors: other experts are other contents of the same tables."""

from __future__ import annotations

import dataclasses
import gc
import os
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from server.engine.attention import AttentionBatch
from server.engine.expert import DecodedExpert
from server.engine.graphs import Capture, DecodeGraphs, GraphCapture, eagerly
from server.engine.host_tier import HostTier
from server.engine.kernels import backend
from server.engine.kernels.types import BitPlanes, SparseRows
from server.engine.kv_cache import KVCache
from server.engine.layout import Span, lay_out
from server.engine.loader import ExpertLoader
from server.engine.mixed import MixedWeights
from server.engine.mixed_graphs import Form, HeldTerms, MixedForms
from server.engine.model import BaseModel
from server.engine.scheduler import Work
from server.engine.sequence import Sequence
from server.engine.sites import find_sites
from server.engine.types import EngineRequest, SamplingParams
from store.mix import BASE_MIX, Mix
from tests.engine.conftest import Library
from tests.engine.replaying import as_launch, replayed
from tests.tiny import save_base

pytest.importorskip("triton", reason="triton is not installed")

CPU = torch.device("cpu")
MAX_BATCH = 9


class World:
    """A base, experts that move everything, and mixed mode twice: as ever on the reference's kernels, and captured."""

    def __init__(self, folder: Path, architecture: str, device: torch.device = CPU) -> None:
        self.device = device
        library = Library(save_base(folder / "base", architecture), folder)
        self.model = BaseModel(library.base, dtype=torch.float32, device=device, feature_layer=1, cache_dir=None)
        found = find_sites(self.model.network, self.model.parameters, self.model.try_out)
        self.kernels = backend("triton", device)
        self.plain = MixedWeights(*found, self.model.parameters, backend("reference", device))
        self.mixed = MixedWeights(*found, self.model.parameters, self.kernels)
        self.loader = ExpertLoader(self.model.manifest, device, library.read, HostTier(0))
        densities = (0.3, 0.02, 0.3, 0.02, 0.3)
        self.digests = [library.add(seed, density=density) for seed, density in enumerate(densities, 1)]
        self.experts: dict[str, DecodedExpert] = {digest: self.loader.load(digest) for digest in self.digests}
        one, _, three, _, _ = self.digests
        self.mixes = [BASE_MIX, *(Mix.of({digest: 1.0}) for digest in self.digests), Mix.of({one: 0.5, three: -0.7})]
        shape = self.model.kv_shape
        self.cache = KVCache(shape, 64 * shape.block_bytes, device)

    def graphs(self, capture: Capture) -> DecodeGraphs:
        return DecodeGraphs(self.model, self.cache, MAX_BATCH, capture, self.kernels)

    def work(self, mixes: list[Mix]) -> list[Work]:
        """The first token of a sequence each, those of a mix side by side."""
        made = []
        for number, mix in enumerate(sorted(mixes, key=lambda mix: (not mix.is_base, mix.digest))):
            request = EngineRequest((7 * number % 256,), SamplingParams(1), mix)
            sequence = Sequence(request, 1, emit=lambda _: None)
            assert self.cache.grow(sequence, 1)
            made.append(Work(sequence, 1))
        return made

    def check(self, graphs: DecodeGraphs, mixes: list[Mix]) -> bool:
        """Whether the step ran over fixed tensors; if so, it must say what an ordinary one says."""
        work = self.work(mixes)
        layout = lay_out(work)
        with self.plain.carrying(layout.spans, layout.logit_spans, self.experts):
            batch = AttentionBatch(layout.segments, self.cache, self.device)
            expected = self.model.forward(layout.tokens, batch, layout.logit_rows)
        got = graphs.run(layout, frozenset(), self.mixed.terms(layout.spans, layout.logit_spans, self.experts))
        for item in work:
            self.cache.release(item.sequence)
        self.mixed.forget()
        self.plain.forget()
        if got is None:
            return False
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        return True


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("TRITON_INTERPRET=1 was not set, or there is a GPU")
    from server.engine.kernels.gpu import TritonKernels

    with pytest.MonkeyPatch.context() as patch:
        for name in ("add_launches", "absorb"):
            patch.setattr(TritonKernels, name, as_launch(getattr(TritonKernels, name)))
        yield World(tmp_path_factory.mktemp("world"), "qwen2")


def test_one_capture_serves_other_experts(world: World) -> None:
    """Planes and lists of nonzeros, norms, biases and embeddings. Only the first step is run, of the second
    the operations on tensors alone."""
    _, _, two, three, four, five, _ = world.mixes
    graphs = world.graphs(replayed)
    for mixes in ([two, three], [five, four]):
        assert world.check(graphs, mixes)
    assert (graphs.captures, graphs.replays) == (1, 2)


def test_a_mix_whose_deltas_are_of_two_forms_runs_as_ever(world: World) -> None:
    graphs = world.graphs(eagerly)
    assert not world.check(graphs, [Mix.of(dict.fromkeys(world.digests[:2], 0.5))])
    assert graphs.captures == 0


def test_a_product_that_fails_leaves_nothing_behind_for_the_next(world: World) -> None:
    """Wherever memory runs out: in what experts add, in the base's product, or after both."""
    aside = world.graphs(eagerly)._forms.aside  # type: ignore[union-attr]
    aside.prepare(world.mixed)
    x, weight = torch.randn(2, 3), torch.randn(5, 3)

    def plain(rows: torch.Tensor) -> torch.Tensor:
        return rows @ weight.T

    def add(y: torch.Tensor, rows: torch.Tensor) -> None:
        y += 2 * plain(rows)

    def full(y: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
        y += 1  # half-way
        raise torch.OutOfMemoryError("no room")

    for failing in ((full, add), (plain, full)):
        with pytest.raises(torch.OutOfMemoryError):
            aside.product(failing[0], x.clone(), 5, failing[1])
        torch.testing.assert_close(aside.product(plain, x, 5, add), 3 * plain(x))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(aside._kernels, "absorb", full)
        with pytest.raises(torch.OutOfMemoryError):
            aside.product(plain, x, 5, add)
    torch.testing.assert_close(aside.product(plain, x, 5, add), 3 * plain(x))


def held_by(world: World, experts: dict[str, DecodedExpert], mixes: list[Mix]) -> tuple[Form, HeldTerms]:
    """The tensors of a captured step with a row for each mix, filled; the step itself is forgotten."""
    spans = tuple(Span(mix, row, row + 1) for row, mix in enumerate(mixes))
    forms = MixedForms(world.kernels, MAX_BATCH)
    terms = world.mixed.terms(spans, spans, experts)
    form = forms.of(terms)
    assert form is not None
    held = HeldTerms(terms, form, len(mixes), forms, world.device)
    held.fill(terms, form, torch.arange(len(mixes)))
    world.mixed.forget()
    return form, held


def written(form: Form) -> set[int]:
    """What stands in the tables: addresses, among other numbers."""
    tables = np.zeros(form.tables.size, np.int64)
    form.tables.fill(tables)
    return set(tables.tolist())


def matrices(expert: DecodedExpert) -> set[int]:
    """Where the expert's deltas of linear layers lie."""
    deltas = [delta for name, delta in expert.tensors.items() if "_proj.weight" in name]
    assert all(isinstance(delta, BitPlanes | SparseRows) for delta in deltas)
    fields = [getattr(delta, field.name) for delta in deltas for field in dataclasses.fields(delta)]
    return {field.data_ptr() for field in fields if isinstance(field, torch.Tensor)}


def test_an_evicted_expert_leaves_memory_and_is_found_anew_when_it_comes_back(world: World) -> None:
    """Although a captured step still has tables that say where it was, and its digest is the same."""
    mixes, digest = world.mixes[1:3], world.digests[0]
    experts = {**world.experts, digest: world.loader.load(digest)}
    form, held = held_by(world, experts, mixes)
    first = matrices(experts[digest])
    assert first <= written(form)
    parcel = experts[digest].parcel
    assert parcel is not None
    memory, stays = weakref.ref(parcel.buffer), parcel.buffer.untyped_storage()
    del parcel, experts[digest]
    gc.collect()
    assert memory() is None
    experts[digest] = world.loader.load(digest)  # elsewhere, for that place is not free yet
    assert stays.nbytes()
    assert held.plan
    later, _ = held_by(world, experts, mixes)
    assert matrices(experts[digest]) <= written(later)
    assert first.isdisjoint(written(later))
    assert later.key == form.key


@pytest.mark.gpu
def test_a_graph_serves_other_experts(tmp_path: Path) -> None:
    device = torch.device("cuda")
    world = World(tmp_path, "qwen2", device)
    base, one, two, three, four, five, both = world.mixes
    graphs = world.graphs(GraphCapture(device))
    for mixes in ([one, three, base], [five, base, base, one], [two, three], [five, four], [both, base]):
        assert world.check(graphs, mixes)
    assert graphs.captures < graphs.replays
