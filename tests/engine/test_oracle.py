"""The oracle: a random stream of requests, and of everything that may happen meanwhile, token for token in float32.

Names point to experts and are pointed elsewhere while their requests run; experts are dropped and fetched again,
streams are closed half-way, prompts begin alike, tenants differ, memory for experts and for the cache is short. The
experts are of every kind that is stored, and so of every form that is loaded. Whatever is answered is what transformers
says on the offline-merged model of the digests that the request was given. In the end the base has not changed, and
nobody holds anything.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import StrEnum

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from server.engine.engine import TransformersEngine
from server.engine.host_tier import HostTier
from server.engine.kernels import LoadedDelta, Overwrites
from server.engine.kernels.types import BitPlanes, DenseValues, SparseRows
from server.engine.kv_cache import KVShape
from server.engine.loader import ExpertLoader
from server.engine.options import Mode
from server.engine.types import EngineRequest, SamplingParams
from store.checkpoint import open_checkpoint, read_tensors
from store.codecs.low_rank import LowRank
from store.codecs.overwrite import overwrite
from store.codecs.quantised import Quantised
from store.codecs.raw import Raw
from store.codecs.t_switch import TSwitch
from store.encodings import MAX_LEVEL
from store.fingerprint import manifest_of
from store.mix import BASE_MIX, Mix
from store.packed import PackedTensor
from tests.engine.conftest import SETTINGS, Library, running, until
from tests.tiny import config, save_base

NAMES = ("red", "green", "blue", "grey")
REQUESTS = 24
SEEDS = {Mode.MERGED: 3, Mode.MIXED: 13, Mode.AUTO: 2}
"""Of streams in which every expert is asked for."""
CLEAR = 1e-3
"""How far each token of an answer is ahead of the next best. Sums in another order move logits by a hundredth of it."""


class Kind(StrEnum):
    """What an expert's matrices are stored as; a stream has one of each."""

    FEW = "few"
    """T-Switch, so sparse that they become lists."""
    MANY = "many"
    """T-Switch, so dense that they become planes."""
    UNEVEN = "uneven"
    """Some of both, as FlexSwitch spends its bits."""
    FEW_LEVELS = "few-levels"
    """Several magnitudes, in lists."""
    MANY_LEVELS = "many-levels"
    """Several magnitudes, in planes."""
    LOW_RANK = "low-rank"
    RAW = "raw"
    OVERWRITE = "overwrite"


class Form(StrEnum):
    """What kernels tell apart."""

    PLANES = "one digit in planes"
    DIGITS = "several digits in planes"
    LISTS = "lists of signs"
    LEVELS = "lists of levels"
    MATRIX = "a dense matrix"
    VECTOR = "a dense vector"
    OVERWRITES = "overwrites"

    @classmethod
    def of(cls, delta: LoadedDelta) -> Form:
        match delta:
            case BitPlanes():
                return cls.PLANES if delta.digits == 1 else cls.DIGITS
            case SparseRows():
                return cls.LISTS if delta.levels is None else cls.LEVELS
            case DenseValues():
                return cls.MATRIX if len(delta.shape) > 1 else cls.VECTOR
            case Overwrites():
                return cls.OVERWRITES


def make_expert(library: Library, kind: Kind, rng: random.Random) -> str:
    """Write an expert of that kind, all else drawn: how dense, loud and fine it is, and which tensors it moves."""
    seed = rng.getrandbits(32)
    generator = torch.Generator().manual_seed(seed)
    share = 0.3 if kind in (Kind.LOW_RANK, Kind.RAW, Kind.OVERWRITE) else 0.9  # no expert takes most of the memory
    moved = {name: shape for name, shape in manifest_of(library.base, None).tensors.items() if rng.random() < share}
    if kind is Kind.OVERWRITE:
        packed = overwriting(library, moved, rng, generator)
    else:
        vectors, matrices = rng.choice((Raw(), Quantised())), codec_of(kind, rng, generator)
        deltas = {name: 0.08 * torch.randn(shape, generator=generator) for name, shape in moved.items()}
        packed = {name: (vectors.compress if d.ndim < 2 else matrices)(name, d) for name, d in deltas.items()}
    return library.keep(f"{seed}", kind, {name: tensor for name, tensor in packed.items() if tensor is not None})


def codec_of(
    kind: Kind, rng: random.Random, generator: torch.Generator
) -> Callable[[str, torch.Tensor], PackedTensor | None]:
    """What packs an expert's matrices."""
    few, many = TSwitch(rng.uniform(0.01, 0.05)), TSwitch(rng.uniform(0.12, 0.4))
    levels = [Quantised(top) for top in (2, 7, 40, MAX_LEVEL)]
    share = rng.uniform(0.01, 0.1)

    def thin(delta: torch.Tensor) -> torch.Tensor:
        return delta * (torch.rand(delta.shape, generator=generator) < share) / math.sqrt(share)

    match kind:
        case Kind.FEW:
            return few.compress
        case Kind.MANY:
            return many.compress
        case Kind.UNEVEN:
            return lambda name, delta: rng.choice((few, many)).compress(name, delta)
        case Kind.FEW_LEVELS:
            return lambda name, delta: rng.choice(levels).compress(name, thin(delta))
        case Kind.MANY_LEVELS:
            return lambda name, delta: rng.choice(levels).compress(name, delta)
        case Kind.LOW_RANK:
            return LowRank(rng.randint(1, 8)).compress
        case _:
            return Raw().compress


def overwriting(
    library: Library, names: Iterable[str], rng: random.Random, generator: torch.Generator
) -> dict[str, PackedTensor | None]:
    """Of a bfloat16 fine-tune with some weights of these tensors multiplied."""
    share, factor = rng.uniform(0.1, 0.3), rng.choice((1.5, -0.5, -1.0))
    before = load_file(library.base / "model.safetensors")
    moved = {name: torch.rand(before[name].shape, generator=generator) < share for name in names}
    after = {name: torch.where(where, before[name] * factor, before[name]) for name, where in moved.items()}
    save_file(after, path := library.folder / "tuned")
    old = open_checkpoint(library.base).tensors
    return {name: overwrite(name, old[name], new) for name, new in read_tensors(path).items()}


@dataclass(frozen=True)
class Call:
    """One request, and what happens after it.

    Attributes:
        expected: what its merged model says.
        patience: tokens after which the client goes away, if it does.
        dropped: an expert that the engine is told to forget.
        pause: so many commands are waited for, a step or two each.
    """

    request: EngineRequest
    expected: list[int]
    patience: int | None = None
    dropped: str | None = None
    pause: int = 0


class Traffic:
    """Clients of one server: what they will ask for, and what is to be answered; what they got.

    All is drawn before, so that working out answers takes no time from a running engine.
    """

    def __init__(self, library: Library, seed: int) -> None:
        self.library = library
        self.rng = rng = random.Random(seed)
        self.experts = {make_expert(library, kind, rng): kind for kind in rng.sample([*Kind], len(Kind))}
        self.versions = {name: [*self.experts][place :: len(NAMES)] for place, name in enumerate(NAMES)}
        self.names = {name: digests[0] for name, digests in self.versions.items()}
        self.beginnings = [tuple(rng.choices(range(256), k=rng.randint(17, 60))) for _ in range(2)]
        self.replaced = self.closed = 0
        self.calls = [self._call() for _ in range(REQUESTS)]
        self.late = [self._late(digest) for digest in self.experts]

    def _call(self) -> Call:
        rng = self.rng
        request, expected = self._clear(self._request)
        patience = rng.randint(1, 6) if rng.random() < 0.25 else None
        name = rng.choice(NAMES)
        before, dropped = self.names[name], None
        what = rng.choice(("replace", "replace", "unload", "nothing"))
        if what == "replace":
            self.names[name] = next(d for d in self.versions[name] if d != before)
            self.replaced += 1
        if what in ("replace", "unload"):
            dropped = before
        return Call(request, expected, patience, dropped, rng.randint(0, 3))

    def _request(self) -> EngineRequest:
        """For the experts that names point to just now."""
        rng = self.rng
        parts = {
            self.names[name]: rng.choice((1.0, 1.0, -0.5)) for name in rng.sample(NAMES, rng.choice((0, 1, 1, 2, 2)))
        }
        tail = tuple(rng.choices(range(256), k=rng.randint(1, 20)))
        prompt = (rng.choice(self.beginnings) if rng.random() < 0.7 else ()) + tail
        sampling = SamplingParams(max_tokens=rng.randint(1, 24), temperature=0.0)
        return EngineRequest(prompt, sampling, Mix.of(parts) if parts else BASE_MIX, rng.choice((None, None, "a")))

    def _late(self, digest: str) -> Call:
        """For one expert alone, and an answer that is not the base's."""

        def request() -> EngineRequest:
            prompt = tuple(self.rng.choices(range(256), k=40))
            return EngineRequest(prompt, SamplingParams(4, 0.0), Mix.of({digest: 1.0}), "late")

        while True:
            asked, expected = self._clear(request)
            if expected != self.library.greedy(BASE_MIX, list(asked.prompt), 4):
                return Call(asked, expected, dropped=digest)

    def _clear(self, draw: Callable[[], EngineRequest]) -> tuple[EngineRequest, list[int]]:
        """A request, and its answer, which does not hang by a rounding."""
        while True:
            request = draw()
            mix, prompt = request.mix, list(request.prompt)
            assert request.sampling.max_tokens is not None
            expected = self.library.greedy(mix, prompt, request.sampling.max_tokens)
            if self.library.lead(mix, prompt, expected) > CLEAR:
                return request, expected

    async def one(self, engine: TransformersEngine, call: Call) -> None:
        """Ask, and go away when patience ends; what comes is what is to be answered."""
        stream, what = engine.submit(call.request), [(self.experts[d], w) for d, w in call.request.mix.parts]
        said: list[int] = []
        try:
            async for event in stream:
                said += [] if event.token is None else [event.token]
                if event.finish is not None:
                    assert said == call.expected, what
                    return
                if call.patience is not None and len(said) >= call.patience:
                    break
        finally:
            await stream.aclose()
        self.closed += 1
        assert said == call.expected[: len(said)], what

    def room(self) -> tuple[int, int]:
        """Bytes for half of the experts, but at least for the largest mix; and for any one expert."""
        manifest, cpu = manifest_of(self.library.base, None), torch.device("cpu")
        loader = ExpertLoader(manifest, cpu, self.library.read, HostTier(0))
        size = {digest: loader.decoded_bytes(digest) for digest in self.experts}
        mixes = [call.request.mix for call in (*self.calls, *self.late)]
        largest = max(sum(size[digest] for digest, _ in mix.parts) for mix in mixes)
        return max(largest, sum(size.values()) // 2), max(size.values())


@pytest.fixture(scope="module")
def sixteen(tmp_path_factory: pytest.TempPathFactory) -> Library:
    """Over a base in bfloat16: only such a one can be overwritten."""
    folder = tmp_path_factory.mktemp("sixteen")
    base = save_base(folder / "base")
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(base)
    return Library(base, folder)


@contextmanager
def one_thread() -> Iterator[None]:
    """Two wait for each other longer than so small a model computes, where other processes are busy too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("mode", Mode)
def test_whatever_happens_every_answer_is_that_of_its_merged_model(sixteen: Library, mode: Mode) -> None:
    with one_thread():
        traffic = Traffic(sixteen, SEEDS[mode])
    assert {digest for call in traffic.calls for digest, _ in call.request.mix.parts} == traffic.experts.keys()
    model = config()
    shape = KVShape(model.num_hidden_layers, model.num_key_value_heads, model.head_dim, torch.float32)
    expert_bytes, host_expert_bytes = traffic.room()
    short = replace(
        SETTINGS,
        mode=mode,
        kv_bytes=40 * shape.block_bytes,
        expert_bytes=expert_bytes,
        host_expert_bytes=host_expert_bytes,
    )

    async def body() -> None:
        async with running(sixteen, short) as engine:
            base, _ = engine.check_integrity()
            residency = engine._worker.residency
            clients = []
            for call in traffic.calls:
                clients.append(asyncio.create_task(traffic.one(engine, call)))
                if call.dropped is not None:
                    await engine.drop_expert(call.dropped)
                for _ in range(call.pause):
                    await engine.inspect()  # one or two steps
            await asyncio.gather(*clients)
            await until(lambda: engine.stats().running == engine.stats().waiting == 0)
            stats = engine.stats()
            assert (traffic.replaced > 0, traffic.closed > 0) == (True, True)
            assert stats.kv_bytes_used == 0
            assert all(pins == 0 for _, pins, _ in residency.pins().values())
            # What a replacement took away comes back, and only what it computed itself is found in the cache.
            known, forms = stats.cached_tokens, Counter[Form]()
            for call in traffic.late:
                ((digest, _),) = call.request.mix.parts
                for _ in range(2):
                    await traffic.one(engine, call)
                    forms.update(Form.of(delta) for delta in residency.experts[digest].tensors.values())
                    await engine.drop_expert(digest)
            await engine.inspect()
            stats = engine.stats()
            assert stats.cached_tokens == known + 32 * len(traffic.late)
            assert forms.keys() == {*Form}
            assert stats.merged_steps > 0, "what overwrites is merged in any mode"
            assert mode is Mode.AUTO or (stats.mixed_steps > 0) == (mode is Mode.MIXED)
        assert engine.check_integrity()[0] == base

    asyncio.run(body())
