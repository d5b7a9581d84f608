"""A tiny base, real expert files of it, and an engine over both."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from server.engine.engine import TransformersEngine
from server.engine.options import EngineSettings
from server.engine.types import EngineRequest, FinishReason, SamplingParams
from store.codecs.raw import Raw
from store.codecs.t_switch import Knob, TSwitch
from store.deltas import OverwriteDelta, SparseDelta
from store.errors import ExpertUnavailableError
from store.expert_file import ExpertInfo, digest_of, read_deltas, write_expert
from store.fingerprint import manifest_of
from store.mix import BASE_MIX, Mix
from store.packed import PackedTensor
from store.patterns import Half
from tests.tiny import save_base

SETTINGS = EngineSettings(kv_bytes=4 << 20, feature_layer=2, turn_steps=4, step_tokens=48)


@dataclass
class Library:
    """Expert files of one base on disk, by digest, and the merged model each mix should equal."""

    base: Path
    folder: Path
    files: dict[str, Path] = field(default_factory=dict)
    models: dict[Mix, torch.nn.Module] = field(default_factory=dict)
    """Merged models made so far."""

    def read(self, digest: str) -> bytes:
        if digest not in self.files:
            raise ExpertUnavailableError("its bytes are gone")
        return self.files[digest].read_bytes()

    def add(self, seed: int, *, density: float = 0.3, scale: float = 0.08) -> str:
        """Write an expert that moves every tensor of the base: matrices ternary, norms and biases raw."""
        manifest = manifest_of(self.base, None)
        generator = torch.Generator().manual_seed(seed)
        packed: dict[str, PackedTensor] = {}
        for name, shape in manifest.tensors.items():
            delta = torch.randn(shape, generator=generator) * scale
            codec = TSwitch(density, Knob.L1) if len(shape) > 1 else Raw()
            tensor = codec.compress(name, delta)
            assert tensor is not None
            packed[name] = tensor
        return self.keep(str(seed), "t-switch", packed)

    def keep(self, stem: str, codec: str, packed: Mapping[str, PackedTensor]) -> str:
        """Write an expert of these tensors."""
        path = self.folder / f"{stem}.safetensors"
        write_expert(path, ExpertInfo(codec=codec, tool="test"), packed, manifest_of(self.base, None))
        digest = digest_of(path)
        self.files[digest] = path
        return digest

    def merged(self, mix: Mix) -> torch.nn.Module:
        """The offline-merged model: base + Σ weight·delta in float32, by nothing the engine uses."""
        if mix not in self.models:
            self.models[mix] = self._merge(mix)
        return self.models[mix]

    def _merge(self, mix: Mix) -> torch.nn.Module:
        if mix.is_base:
            base: torch.nn.Module = AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32)
            return base
        model = copy.deepcopy(self.merged(BASE_MIX))
        manifest = manifest_of(self.base, None)
        parameters = dict(model.named_parameters())
        totals: dict[str, torch.Tensor] = {}
        for digest, weight in mix.parts:
            for name, delta in read_deltas(self.files[digest], manifest):
                dense = torch.zeros(parameters[name].shape)
                if isinstance(delta, SparseDelta):
                    values = torch.from_numpy(delta.levels).float() * torch.tensor(weight * delta.scale)
                    dense.view(-1)[torch.from_numpy(delta.indices).long()] = values
                elif isinstance(delta, OverwriteDelta):
                    assert delta.half is Half.BF16
                    places = torch.from_numpy(delta.indices).long()
                    old = parameters[name].detach().view(-1)[places].bfloat16()
                    new = (old.view(torch.int16) + torch.from_numpy(delta.steps)).view(torch.bfloat16)
                    dense.view(-1)[places] = (new.float() - old.float()) * weight
                else:
                    dense = torch.from_numpy(delta.values) * weight
                totals[name] = totals.get(name, torch.zeros_like(dense)) + dense
        with torch.no_grad():
            for name, total in totals.items():
                parameters[name].add_(total)
        return model

    def greedy(self, mix: Mix, prompt: list[int], max_tokens: int) -> list[int]:
        """What transformers' own `generate` says on the merged model."""
        model = self.merged(mix)
        output = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=max_tokens,
            do_sample=False,
            attention_mask=torch.ones(1, len(prompt)),
        )
        answer: list[int] = output[0, len(prompt) :].tolist()
        return answer[: answer.index(256)] if 256 in answer else answer

    def lead(self, mix: Mix, prompt: list[int], answer: list[int]) -> float:
        """How far a greedy answer's tokens, and the one after them, are ahead of the next best: at least so far."""
        with torch.inference_mode():
            logits = self.merged(mix)(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 :]
        best = logits.topk(2).values
        return float((best[:, 0] - best[:, 1]).min())


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    folder = tmp_path_factory.mktemp("library")
    return Library(save_base(folder / "base"), folder)


@asynccontextmanager
async def running(library: Library, settings: EngineSettings = SETTINGS) -> AsyncIterator[TransformersEngine]:
    """A started engine; afterwards the base must be what it was at load."""
    engine = TransformersEngine(library.base, name="tiny", settings=settings, read_expert=library.read)
    at_load, _ = engine.check_integrity()
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()
        assert engine.check_integrity()[0] == at_load


async def collect(
    engine: TransformersEngine, prompt: list[int], mix: Mix, max_tokens: int = 12, **sampling: Any
) -> tuple[list[int], FinishReason]:
    params = SamplingParams(max_tokens=max_tokens, **({"temperature": 0.0} | sampling))
    tokens = []
    finish = None
    async for event in engine.submit(EngineRequest(tuple(prompt), params, mix)):
        if event.token is not None:
            tokens.append(event.token)
        finish = event.finish
    assert finish is not None
    return tokens, finish


async def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Wait for a state that another thread brings about."""
    deadline = asyncio.get_running_loop().time() + seconds
    while not condition():
        assert asyncio.get_running_loop().time() < deadline, "it never happened"
        await asyncio.sleep(0.005)
