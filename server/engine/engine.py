"""The engine's public face: requests in, tokens out, one thread in between that owns the model."""

from __future__ import annotations

import asyncio
import gc
import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Items
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from server.engine.base_source import choose_device, choose_dtype
from server.engine.bus import make_current
from server.engine.feature_queue import Job
from server.engine.grammar import Grammars
from server.engine.host_tier import HostTier
from server.engine.inspection import beside
from server.engine.kernels import backend
from server.engine.kernels.cpu import CpuKernels
from server.engine.loader import ExpertLoader
from server.engine.merged import digest_of
from server.engine.model import BaseModel
from server.engine.options import BaseWeights, EngineSettings, Mode
from server.engine.outbox import Outbox
from server.engine.sequence import Sequence
from server.engine.stats import EngineStats
from server.engine.stream import EngineStream
from server.engine.tokenizer import ModelTokenizer
from server.engine.types import TOKEN_CHARACTERS, BaseInfo, EngineRequest, Grammar
from server.engine.worker import Worker
from store.checkpoint import open_checkpoint
from store.errors import ContextLengthError, EngineDeadError, InvalidRequestError, QueueFullError
from store.tiers import Tier

_PATIENCE = 1.0
"""Seconds for which somebody who looks into the engine waits for the end of its step."""

_NOT_RUNNING = "the engine is not running; restart the server"


class TransformersEngine:
    """`Engine` over a transformers causal LM: ragged batches, paged cache, merged and mixed mode.

    Construct it on any thread, which is on the engine's GPU from then on; `start` it on the event loop that will
    consume the tokens. This is the loop's side; what touches the model runs on the engine's own thread
    (`server.engine.worker`).
    """

    def __init__(
        self,
        folder: Path,
        *,
        name: str,
        settings: EngineSettings,
        read_expert: Callable[[str], bytes],
        cache_dir: Path | None = None,
    ) -> None:
        """Load the base.

        Args:
            folder: safetensors checkpoint (`server.engine.base_source.resolve_base`).
            name: what clients call the base.
            read_expert: digest → exactly the bytes of that digest, of a validated expert file; may block, may raise
                ExpertUnavailableError.
            cache_dir: where the base's fingerprint and compiled kernels are kept.

        Raises:
            CheckpointError: no usable model or tokenizer in the folder.
            InvalidRequestError: a setting makes no sense for this base or this machine; `param` names it.
        """
        if settings.base_weights is not BaseWeights.FULL and settings.mode is not Mode.MIXED:
            raise InvalidRequestError(
                f"base_weights={settings.base_weights} needs mode=mixed: nothing can be merged into quantised weights",
                param="mode",
            )
        device = choose_device(settings.device)
        make_current(device)
        dtype = choose_dtype(settings.dtype, device)
        self._settings = settings
        self._model = BaseModel(
            folder,
            dtype=dtype,
            device=device,
            feature_layer=settings.feature_layer,
            cache_dir=cache_dir,
            weights=settings.base_weights,
        )
        self._tokenizer = ModelTokenizer(folder)
        eos = self._tokenizer.eos_token_id
        self._stop_tokens = self._model.stop_tokens | (frozenset() if eos is None else {eos})
        self._grammars = Grammars(lambda: self._tokenizer.for_grammars(self._model.vocabulary, self._stop_tokens))
        self._compiler = ThreadPoolExecutor(1, thread_name_prefix="grammars")
        self._outbox = Outbox()
        is_gpu = device.type == "cuda"
        host = HostTier(
            _host_bytes(settings, device),
            page_locked=is_gpu,
            on_thread=partial(make_current, device) if is_gpu else None,
        )
        kernels = backend(settings.kernels, device, cache_dir)
        kernels.prepare(dtype, device)
        transcode = kernels.transcode if device.type == "cuda" or kernels.name == "cpu" else None
        loader = ExpertLoader(
            self._model.manifest,
            device,
            read_expert,
            host,
            open_checkpoint(folder),
            transcode,
            kernels.lists_below,
            kernels.lanes,
            kernels.decode_overwrite if isinstance(kernels, CpuKernels) else None,
        )
        self._worker = Worker(self._model, kernels, loader, self._outbox, settings)
        self._base = BaseInfo(
            name=name,
            manifest=self._model.manifest,
            context_length=min(self._model.context_length, self._worker.cache.capacity_tokens),
            vocabulary=self._model.vocabulary,
            feature_dim=self._model.hidden_size,
            feature_layer=self._model.feature_layer,
            dtype=str(dtype).removeprefix("torch."),
            device=str(device),
        )
        self._open: Counter[str | None] = Counter()
        """Unfinished requests by tenant."""
        self._embedding: Counter[str | None] = Counter()
        """Unfinished calls of `embed` by tenant."""

    @property
    def base(self) -> BaseInfo:
        return self._base

    @property
    def tokenizer(self) -> ModelTokenizer:
        return self._tokenizer

    @property
    def alive(self) -> bool:
        return self._worker.alive

    async def start(self) -> None:
        self._outbox.open(asyncio.get_running_loop())
        # What has been loaded stays for as long as the engine runs: searched for garbage with the rest, hundreds of
        # thousands of objects keep every thread waiting for 0.2 s, and that every few hundred steps.
        gc.freeze()
        self._worker.start()

    async def stop(self) -> None:
        await asyncio.to_thread(self._worker.stop)
        gc.unfreeze()
        self._compiler.shutdown(wait=False, cancel_futures=True)

    async def check_grammar(self, grammar: Grammar) -> None:
        if not self._grammars.has(grammar):
            # On a thread of their own, one at a time: others must not wait for those that take long.
            await asyncio.get_running_loop().run_in_executor(self._compiler, self._grammars.matcher, grammar)

    def submit(self, request: EngineRequest) -> EngineStream:
        if not self.alive:
            raise EngineDeadError(_NOT_RUNNING)
        self._check_room(self._open, request.tenant)
        if not request.prompt:
            raise InvalidRequestError("the prompt has no tokens", param="prompt")
        self._check_vocabulary(request.prompt, "prompt")
        self._check_vocabulary((token for token, _ in request.sampling.logit_bias), "logit_bias")
        self._check_vocabulary(request.sampling.stop_tokens, "stop_token_ids")
        room = self._base.context_length - len(request.prompt)
        most = request.sampling.max_tokens
        wanted = 1 if most is None else most
        if wanted > room:
            raise ContextLengthError(
                f"{_longest(self._base)}; the prompt has {len(request.prompt)} and {wanted} more were asked for",
                param="max_tokens" if room >= 1 else "messages",
            )
        limit = room if most is None else most
        grammar = request.sampling.grammar
        stream = EngineStream(
            request,
            limit,
            self._outbox,
            eos=self._stop_tokens,
            grammar=None if grammar is None else self._grammars.matcher(grammar),
            closed=partial(self._closed, request.tenant),
            cancel=self._cancel,
        )
        if not self._worker.post(lambda: self._worker.admit(stream.sequence)):
            raise EngineDeadError(_NOT_RUNNING)
        self._open[request.tenant] += 1
        return stream

    def _check_room(self, unfinished: Counter[str | None], tenant: str | None) -> None:
        """A tenant that fills the queue must not shut out one that has nothing in it."""
        if unfinished.total() >= self._settings.max_queue and unfinished[tenant]:
            raise QueueFullError(f"{unfinished.total()} requests are waiting already; try again soon", retry_after=1)

    def _check_vocabulary(self, tokens: Iterable[int], param: str) -> None:
        """A token that there is not would fail the whole batch."""
        if not all(0 <= token < self._base.vocabulary for token in tokens):
            raise InvalidRequestError(f"token ids must be from 0 to {self._base.vocabulary - 1}", param=param)

    async def features(self, texts: Items[str]) -> npt.NDArray[np.float32]:
        limit = self._settings.feature_tokens
        # No more of a text is tokenised than what may make so many tokens: all of it may take seconds.
        starts = [text[: limit * TOKEN_CHARACTERS] for text in texts]
        prompts = await asyncio.to_thread(lambda: [self._tokenizer.encode(text)[:limit] for text in starts])
        if not all(prompts):
            raise InvalidRequestError("an empty text has no routing features", param="prompt")
        return await self._featurized(prompts, self._worker.features.add)

    async def embed(self, prompts: Items[Items[int]], tenant: str | None = None) -> npt.NDArray[np.float32]:
        self._check_room(self._embedding, tenant)
        self._embedding[tenant] += 1
        try:
            return await self._featurized(prompts, lambda jobs: self._worker.features.add_embeddings(jobs, tenant))
        finally:
            self._embedding[tenant] -= 1

    async def _featurized(
        self, prompts: Items[Items[int]], add: Callable[[Items[Job]], None]
    ) -> npt.NDArray[np.float32]:
        if not self.alive:
            raise EngineDeadError(_NOT_RUNNING)
        for prompt in prompts:
            self._check_vocabulary(prompt, "input")
            if len(prompt) > self._base.context_length:
                raise ContextLengthError(f"{_longest(self._base)}; the text has {len(prompt)}", param="input")
        loop = asyncio.get_running_loop()
        jobs = [(list(prompt), loop.create_future()) for prompt in prompts]
        if not self._worker.post(lambda: add(jobs)):
            raise EngineDeadError(_NOT_RUNNING)
        rows = await asyncio.gather(*(future for _, future in jobs))
        return np.stack(rows) if rows else np.empty((0, self._base.feature_dim), dtype=np.float32)

    async def drop_expert(self, digest: str) -> None:
        self._worker.post(lambda: self._worker.residency.drop(digest))

    def holdings(self) -> Mapping[Tier, frozenset[str]]:
        """Digests of the experts that are decoded, on the device and in host memory."""
        return self._worker.holdings()

    def stats(self) -> EngineStats:
        return self._worker.stats

    async def inspect(self) -> Mapping[str, Any]:
        loop = asyncio.get_running_loop()
        seen: asyncio.Future[Mapping[str, Any]] = loop.create_future()

        def look() -> None:
            found = self._worker.view()
            self._outbox.call(lambda: None if seen.done() else seen.set_result(found))

        if not self._worker.post(look):
            raise EngineDeadError(_NOT_RUNNING)
        try:
            async with asyncio.timeout(_PATIENCE):
                return await seen
        except TimeoutError:
            # A step may take minutes, of a large base or of a machine that is overrun: then one wants to know most.
            return beside(self._worker.view)

    async def base_sha256(self) -> str:
        # Nobody writes to them, so the engine need not stand still for it.
        return await asyncio.to_thread(lambda: self._with_buffers(self._worker.executor.merged.pristine_fingerprint()))

    def check_integrity(self) -> tuple[str, str]:
        """sha256 of the pristine weights now, and of what the model runs with now, quantised weights and other buffers
        included. The second one for tests: call it when idle."""
        merged = self._worker.executor.merged
        return self._with_buffers(merged.pristine_fingerprint()), self._with_buffers(merged.fingerprint())

    def _with_buffers(self, weights: str) -> str:
        fixed = digest_of(dict(self._model.network.named_buffers()))
        return hashlib.sha256(f"{weights} {fixed}".encode()).hexdigest()

    def _cancel(self, sequence: Sequence) -> None:
        self._worker.post(lambda: self._worker.end(sequence))

    def _closed(self, tenant: str | None) -> None:
        self._open[tenant] -= 1


def _longest(base: BaseInfo) -> str:
    """OpenAI's words, by which clients know that a prompt is too long."""
    return f"this model's maximum context length is {base.context_length} tokens"


def _host_bytes(settings: EngineSettings, device: torch.device) -> int:
    if settings.host_expert_bytes is not None:
        return settings.host_expert_bytes
    return 0 if device.type == "cpu" else 4 * settings.expert_bytes
