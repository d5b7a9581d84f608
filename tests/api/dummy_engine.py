"""An engine without a model: bytes are tokens, answers are a function of the request, features count words."""

from __future__ import annotations

import asyncio
import hashlib
import json
import zlib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from server.engine.stats import EngineStats
from server.engine.timing import Timing
from server.engine.types import BaseInfo, EngineRequest, FinishReason, Grammar, Likelihood, Message, TokenEvent
from store.errors import ContextLengthError, EngineDeadError, InvalidRequestError, QueueFullError
from store.manifest import BaseManifest
from store.tiers import Tier, TierStats

MANIFEST = BaseManifest(hashlib.sha256(b"dummy").hexdigest(), {"embed": (16, 4), "layer.weight": (8, 8), "norm": (4,)})
VOCABULARY = 258
SPECIAL = 256
"""A token without text."""
CONTEXT = 4096
DIMENSIONS = 256

Reply = Callable[[EngineRequest], bytes]


def tell(request: EngineRequest) -> bytes:
    """The default reply: who answers, with which seed, and the prompt's last line."""
    who = "+".join(f"{digest[:8]}*{weight:g}" for digest, weight in request.mix.parts) or "base"
    seed = f" #{request.sampling.seed}" if request.sampling.seed is not None and request.sampling.temperature else ""
    said = bytes(token for token in request.prompt if token < SPECIAL).removesuffix(b"\nassistant: ")
    return f"{who}{seed} heard: ".encode() + said.rpartition(b"\n")[2]


def likelihood(token: int, best: int) -> Likelihood:
    """A likelihood that is a function of the token; the likeliest in its place are itself and those after it."""
    return Likelihood(token, -token / 100, tuple((token + i, -token / 100 - i) for i in range(best)))


class DummyTokenizer:
    """UTF-8 bytes."""

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        return list(text.encode())

    chat_template = ""
    special_tokens: Mapping[str, str] = {"eos_token": "<special>"}

    def encode_chat(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        turns = [f"{message['role']}: {message['content']}\n" for message in messages]
        said = [f"{json.dumps(tool)}\n" for tool in tools]
        calls = [f"{json.dumps(message['tool_calls'])}\n" for message in messages if "tool_calls" in message]
        return self.encode("".join(said + calls + turns) + "assistant: ")

    def token_bytes(self, token: int) -> bytes:
        return bytes([token]) if token < SPECIAL else b"<special>"

    def decode(self, tokens: Sequence[int], *, special: bool = False) -> str:
        return bytes(token for token in tokens if token < SPECIAL).decode(errors="replace")


class DummyStream:
    """The tokens of one reply, one per turn of the event loop or per `delay`."""

    def __init__(self, engine: DummyEngine, request: EngineRequest) -> None:
        self.request = request
        self.given = 0
        self.closed = False
        self._engine = engine
        self._reply = engine.reply(request)
        most = request.sampling.max_tokens
        self._limit = CONTEXT - len(request.prompt) if most is None else most
        asked = request.sampling.prompt_logprobs
        self._scored = () if asked is None else tuple(likelihood(token, asked) for token in request.prompt)
        if self._scored:
            self._scored = (Likelihood(request.prompt[0], None), *self._scored[1:])

    def __aiter__(self) -> AsyncIterator[TokenEvent]:
        return self

    async def __anext__(self) -> TokenEvent:
        if self.closed:
            raise StopAsyncIteration
        await asyncio.sleep(self._engine.delay)
        if self._engine.failure is not None and self.given >= self._engine.fail_after:
            raise self._engine.failure
        scored, self._scored = self._scored, ()
        if not self._limit:
            self.closed = True
            return TokenEvent(None, FinishReason.LENGTH, prompt=scored)
        best = self.request.sampling.logprobs
        timing = None if self.given else self._engine.timing
        cached = 0 if self.given else self._engine.cached_tokens
        if self.given == len(self._reply):
            self.closed = True
            own = None if best is None else likelihood(SPECIAL, best)
            return TokenEvent(None, FinishReason.STOP, own, scored, timing, cached)
        token = self._reply[self.given]
        self.given += 1
        self._engine.generated += 1
        self.closed = self.given == self._limit
        own = None if best is None else likelihood(token, best)
        return TokenEvent(token, FinishReason.LENGTH if self.closed else None, own, scored, timing, cached)

    async def aclose(self) -> None:
        self.closed = True


class DummyEngine:
    """Implements `server.engine.types.Engine`; its attributes are the tests' levers."""

    def __init__(self, name: str = "dummy-base") -> None:
        self.base = BaseInfo(
            name=name,
            manifest=MANIFEST,
            context_length=CONTEXT,
            vocabulary=VOCABULARY,
            feature_dim=DIMENSIONS,
            feature_layer=0,
            dtype="float32",
            device="cpu",
        )
        self.tokenizer = DummyTokenizer()
        self.alive = False
        self.reset()

    def reset(self) -> None:
        """Put the levers back."""
        self.reply: Reply = tell
        self.delay = 0.0
        self.timing: Timing | None = None
        self.cached_tokens = 0
        self.max_queue = 64
        self.failure: Exception | None = None
        self.fail_after = 0
        self.features_failure: Exception | None = None
        self.featurize = asyncio.Event()
        self.featurize.set()
        self.generated = 0
        self.embedding = 0
        """Calls of `embed` that still cost something."""
        self.streams: list[DummyStream] = []
        self.dropped: list[str] = []
        self.resident: frozenset[str] = frozenset()

    @property
    def open(self) -> int:
        """Streams that still cost something."""
        return sum(not stream.closed for stream in self.streams)

    async def start(self) -> None:
        self.alive = True

    async def stop(self) -> None:
        self.alive = False

    async def check_grammar(self, grammar: Grammar) -> None:
        if "nonsense" in grammar.text:
            raise InvalidRequestError("the grammar cannot be used", param=grammar.param)

    def submit(self, request: EngineRequest) -> DummyStream:
        if not self.alive:
            raise EngineDeadError("the dummy is dead")
        if self.open >= self.max_queue:
            raise QueueFullError("too many wait", retry_after=7)
        if max(request.prompt) >= VOCABULARY:
            raise InvalidRequestError("no such token", param="prompt")
        sampling = request.sampling
        if any(token >= VOCABULARY for token, _ in sampling.logit_bias):
            raise InvalidRequestError("no such token", param="logit_bias")
        if any(token >= VOCABULARY for token in sampling.stop_tokens):
            raise InvalidRequestError("no such token", param="stop_token_ids")
        most = request.sampling.max_tokens
        if len(request.prompt) + (1 if most is None else most) > CONTEXT:
            raise ContextLengthError(f"the context holds {CONTEXT} tokens", param="max_tokens")
        self.streams.append(DummyStream(self, request))
        return self.streams[-1]

    async def features(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Word counts, hashed into a few buckets, on the unit sphere."""
        await self.featurize.wait()
        if self.features_failure is not None:
            raise self.features_failure
        rows = np.zeros((len(texts), DIMENSIONS), dtype=np.float32)
        for row, text in zip(rows, texts, strict=True):
            for word in text.lower().split():
                row[zlib.crc32(word.encode()) % DIMENSIONS] += 1
        return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-6)

    async def embed(self, prompts: Sequence[Sequence[int]], tenant: str | None = None) -> npt.NDArray[np.float32]:
        if self.embedding >= self.max_queue:
            raise QueueFullError("too many wait", retry_after=7)
        if any(token >= VOCABULARY for prompt in prompts for token in prompt):
            raise InvalidRequestError("no such token", param="input")
        if any(len(prompt) > CONTEXT for prompt in prompts):
            raise ContextLengthError(f"the context holds {CONTEXT} tokens", param="input")
        self.embedding += 1
        try:
            return await self.features([self.tokenizer.decode(prompt) for prompt in prompts]) * 3
        finally:
            self.embedding -= 1

    def holdings(self) -> dict[Tier, frozenset[str]]:
        return {Tier.DEVICE: self.resident, Tier.HOST: frozenset()}

    async def drop_expert(self, digest: str) -> None:
        self.dropped.append(digest)

    async def inspect(self) -> dict[str, Any]:
        if not self.alive:
            raise EngineDeadError("the dummy is dead")
        lanes = [{"mix": dict(s.request.mix.parts), "running": 1} for s in self.streams if not s.closed]
        return {"step_seconds": None, "lanes": lanes, "weights": [], "experts": [], "waiting_for_experts": []}

    async def base_sha256(self) -> str:
        return hashlib.sha256(b"weights").hexdigest()

    def stats(self) -> EngineStats:
        return EngineStats(
            running=self.open,
            waiting=0,
            kv_bytes_used=0,
            kv_bytes_kept=0,
            kv_bytes_total=1 << 20,
            mix_switches=4,
            patches=3,
            patch_seconds=0.25,
            merged_steps=20,
            mixed_steps=10,
            mixed_seconds=0.125,
            mode_changes=1,
            mode_is_mixed=1,
            prompt_tokens=0,
            cached_tokens=0,
            generated_tokens=self.generated,
            preemptions=0,
            steps=self.generated,
            tiers=(TierStats(Tier.DEVICE, 2048, 1 << 20, 2, loads=3, evictions=1, load_seconds=0.5),),
        )
