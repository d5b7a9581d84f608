"""The oracle: a random stream of requests, and of everything that may happen meanwhile, token for token in float32.

Names point to experts and are pointed elsewhere while their requests run; experts are dropped and fetched again,
streams are closed half-way, prompts begin alike, tenants differ, memory for experts and for the cache is short.
Whatever is answered is what transformers says on the offline-merged model of the digests that the request was given. In
the end the base has not changed, and nobody holds anything.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace

import pytest
import torch

from server.engine.engine import TransformersEngine
from server.engine.host_tier import HostTier
from server.engine.loader import ExpertLoader
from server.engine.options import Mode
from server.engine.types import EngineRequest, SamplingParams
from store.fingerprint import manifest_of
from store.mix import BASE_MIX, Mix
from tests.engine.conftest import SETTINGS, Library, running, until

NAMES = ("red", "green", "blue")
VERSIONS = 2
REQUESTS = 24


class Traffic:
    """Clients of one server: what they may ask for, what they asked, and what they got."""

    def __init__(self, engine: TransformersEngine, library: Library, seed: int) -> None:
        self.engine, self.library = engine, library
        self.rng = random.Random(seed)
        self.versions = {
            name: [library.add(100 + 10 * place + version) for version in range(VERSIONS)]
            for place, name in enumerate(NAMES)
        }
        self.names = {name: digests[0] for name, digests in self.versions.items()}
        self.beginnings = [tuple(self.rng.choices(range(256), k=self.rng.randint(17, 60))) for _ in range(2)]
        self.replaced = self.closed = 0

    def request(self) -> EngineRequest:
        """For the experts that names point to just now."""
        rng = self.rng
        parts = {
            self.names[name]: rng.choice((1.0, 1.0, -0.5)) for name in rng.sample(NAMES, rng.choice((0, 0, 1, 1, 2)))
        }
        tail = tuple(rng.choices(range(256), k=rng.randint(1, 20)))
        prompt = (rng.choice(self.beginnings) if rng.random() < 0.7 else ()) + tail
        sampling = SamplingParams(max_tokens=rng.randint(1, 24), temperature=0.0)
        return EngineRequest(prompt, sampling, Mix.of(parts) if parts else BASE_MIX, rng.choice((None, None, "a")))

    async def one(self, request: EngineRequest, patience: int | None) -> tuple[EngineRequest, list[int], bool]:
        """Ask, and go away after `patience` tokens; what came, and whether it was all."""
        stream = self.engine.submit(request)
        said: list[int] = []
        try:
            async for event in stream:
                said += [] if event.token is None else [event.token]
                if event.finish is not None:
                    return request, said, True
                if patience is not None and len(said) >= patience:
                    break
        finally:
            await stream.aclose()
        self.closed += 1
        return request, said, False

    async def meddle(self) -> None:
        """Point a name at its other version, as a replacement does; drop what is there; or let time pass."""
        name = self.rng.choice(NAMES)
        what = self.rng.choice(("replace", "unload", "nothing", "nothing"))
        if what == "replace":
            before = self.names[name]
            self.names[name] = next(d for d in self.versions[name] if d != before)
            self.replaced += 1
            await self.engine.drop_expert(before)
        elif what == "unload":
            await self.engine.drop_expert(self.names[name])
        for _ in range(self.rng.randint(0, 3)):
            await self.engine.inspect()  # one or two steps


def room_for(library: Library, digests: list[str], count: int) -> int:
    """Bytes for so many experts."""
    loader = ExpertLoader(manifest_of(library.base, None), torch.device("cpu"), library.read, HostTier(0))
    return count * max(loader.decoded_bytes(digest) for digest in digests)


@pytest.mark.parametrize("mode", Mode)
def test_whatever_happens_every_answer_is_that_of_its_merged_model(library: Library, mode: Mode) -> None:
    async def body() -> None:
        async with running(library, replace(SETTINGS, mode=mode)) as engine:
            block = engine._worker.cache.shape.block_bytes
            every = [d for digests in Traffic(engine, library, 0).versions.values() for d in digests]
        short = replace(
            SETTINGS,
            mode=mode,
            kv_bytes=40 * block,
            expert_bytes=room_for(library, every, 3),
            host_expert_bytes=room_for(library, every, 1),
        )
        async with running(library, short) as engine:
            base, _ = engine.check_integrity()
            traffic = Traffic(engine, library, seed=len(mode.value))
            clients = []
            for _ in range(REQUESTS):
                patience = traffic.rng.randint(1, 6) if traffic.rng.random() < 0.25 else None
                clients.append(asyncio.create_task(traffic.one(traffic.request(), patience)))
                await traffic.meddle()
            for request, said, whole in await asyncio.gather(*clients):
                assert request.sampling.max_tokens is not None
                expected = library.greedy(request.mix, list(request.prompt), request.sampling.max_tokens)
                assert said == (expected if whole else expected[: len(said)])
            await until(lambda: engine.stats().running == engine.stats().waiting == 0)
            stats = engine.stats()
            assert (traffic.replaced > 0, traffic.closed > 0) == (True, True)
            assert stats.kv_bytes_used == 0
            assert all(pins == 0 for _, pins, _ in engine._worker.residency.pins().values())
            # What a replacement took away comes back, and only what it computed itself is found in the cache.
            known = stats.cached_tokens
            for digest in every:
                request = EngineRequest(tuple(range(40)), SamplingParams(4, 0.0), Mix.of({digest: 1.0}), "late")
                expected = library.greedy(request.mix, list(request.prompt), 4)
                for _ in range(2):
                    assert (await traffic.one(request, None))[1:] == (expected, True)
                    await engine.drop_expert(digest)
            await engine.inspect()
            assert engine.stats().cached_tokens == known + 32 * len(every)
        assert engine.check_integrity()[0] == base

    asyncio.run(body())
