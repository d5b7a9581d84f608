"""The engine's public face: requests in, tokens out, one thread in between that owns the model."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Items
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from server.engine.feature_queue import FeatureQueue
from server.engine.kv_cache import KVCache
from server.engine.loader import ExpertLoader
from server.engine.merged import MergedWeights
from server.engine.model import BaseModel, choose_device, choose_dtype
from server.engine.outbox import Outbox
from server.engine.residency import Residency
from server.engine.sampler import Sampled
from server.engine.scheduler import Scheduler, Work
from server.engine.sequence import Sequence
from server.engine.step import run_step
from server.engine.stream import EngineStream
from server.engine.tokenizer import ModelTokenizer
from server.engine.types import BaseInfo, EngineRequest, EngineSettings, EngineStats
from store.errors import (
    ContextLengthError,
    EngineDeadError,
    ExpertUnavailableError,
    InvalidRequestError,
    QueueFullError,
    SwitchyardError,
)
from store.mix import Mix

log = logging.getLogger(__name__)

_NOT_RUNNING = "the engine is not running; restart the server"
_FEATURE_STEP = 4
"""Routing features may take this many times `step_tokens` between two steps: they pass a fraction of the layers."""

Command = Callable[[], None]


class TransformersEngine:
    """`Engine` over a transformers causal LM: ragged batches, paged cache, merged mode.

    Construct it anywhere; `start` it on the event loop that will consume the tokens. Everything that touches the
    model, the cache, the scheduler or the residency runs on the engine's own thread.
    """

    def __init__(
        self,
        folder: Path,
        *,
        name: str,
        settings: EngineSettings,
        fetch_expert: Callable[[str], Path],
        cache_dir: Path | None = None,
    ) -> None:
        """Load the base.

        Args:
            folder: safetensors checkpoint (`server.engine.model.resolve_base`).
            name: what clients call the base.
            fetch_expert: digest → local path of a validated expert file; may block, may raise ExpertUnavailableError.
            cache_dir: where the base's fingerprint is remembered.

        Raises:
            CheckpointError: no usable model or tokenizer in the folder.
            InvalidRequestError: a setting makes no sense for this base or this machine; `param` names it.
        """
        device = choose_device(settings.device)
        dtype = choose_dtype(settings.dtype, device)
        self._settings = settings
        self._model = BaseModel(
            folder, dtype=dtype, device=device, feature_layer=settings.feature_layer, cache_dir=cache_dir
        )
        self._tokenizer = ModelTokenizer(folder)
        eos = self._tokenizer.eos_token_id
        self._stop_tokens = self._model.stop_tokens | (frozenset() if eos is None else {eos})
        self._cache = KVCache(self._model.kv_shape, settings.kv_bytes, device)
        self._merged = MergedWeights(self._model.parameters)
        self._scheduler = Scheduler(
            self._cache,
            max_batch=settings.max_batch,
            step_tokens=settings.step_tokens,
            turn_steps=settings.turn_steps,
        )
        loader = ExpertLoader(self._model.manifest, device, fetch_expert)
        self._residency = Residency(loader, settings.expert_bytes, post=self._post)
        self._base = BaseInfo(
            name=name,
            manifest=self._model.manifest,
            context_length=min(self._model.context_length, self._cache.capacity_tokens),
            vocabulary=self._model.vocabulary,
            feature_dim=self._model.hidden_size,
            feature_layer=settings.feature_layer,
            dtype=str(dtype).removeprefix("torch."),
            device=str(device),
        )
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._outbox = Outbox()
        self._features = FeatureQueue(self._model, self._outbox, _FEATURE_STEP * settings.step_tokens)
        self._held: set[Sequence] = set()
        """Sequences whose experts are pinned, or being waited for."""
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._door = threading.Lock()
        self._closed_down = False
        self._open = 0
        self._prompt_tokens = self._generated_tokens = self._steps = 0
        self._stats = self._snapshot()

    @property
    def base(self) -> BaseInfo:
        return self._base

    @property
    def tokenizer(self) -> ModelTokenizer:
        return self._tokenizer

    @property
    def alive(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    async def start(self) -> None:
        self._outbox.open(asyncio.get_running_loop())
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    async def stop(self) -> None:
        if self._thread is None:
            return

        def halt() -> None:
            self._stopping = True

        self._post(halt)
        await asyncio.to_thread(self._thread.join)
        await asyncio.to_thread(self._residency.close)

    def submit(self, request: EngineRequest) -> EngineStream:
        if not self.alive:
            raise EngineDeadError(_NOT_RUNNING)
        if self._open >= self._settings.max_queue:
            raise QueueFullError(f"{self._open} requests are waiting already; try again soon", retry_after=1)
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
                f"the context holds {self._base.context_length} tokens; the prompt has {len(request.prompt)} and "
                f"{wanted} more were asked for",
                param="max_tokens" if room >= 1 else "messages",
            )
        limit = room if most is None else most
        stream = EngineStream(
            request, limit, self._outbox, eos=self._stop_tokens, closed=self._closed, cancel=self._cancel
        )
        if not self._post(lambda: self._admit(stream.sequence)):
            raise EngineDeadError(_NOT_RUNNING)
        self._open += 1
        return stream

    def _check_vocabulary(self, tokens: Iterable[int], param: str) -> None:
        """A token that there is not would fail the whole batch."""
        if not all(0 <= token < self._base.vocabulary for token in tokens):
            raise InvalidRequestError(f"token ids must be from 0 to {self._base.vocabulary - 1}", param=param)

    async def features(self, texts: Items[str]) -> npt.NDArray[np.float32]:
        limit = self._settings.feature_tokens
        prompts = await asyncio.to_thread(lambda: [self._tokenizer.encode(text)[:limit] for text in texts])
        if not all(prompts):
            raise InvalidRequestError("an empty text has no routing features", param="prompt")
        return await self.embed(prompts)

    async def embed(self, prompts: Items[Items[int]]) -> npt.NDArray[np.float32]:
        if not self.alive:
            raise EngineDeadError(_NOT_RUNNING)
        for prompt in prompts:
            self._check_vocabulary(prompt, "input")
            if len(prompt) > self._base.context_length:
                raise ContextLengthError(
                    f"the context holds {self._base.context_length} tokens; the text has {len(prompt)}", param="input"
                )
        loop = asyncio.get_running_loop()
        jobs = [(list(prompt), loop.create_future()) for prompt in prompts]
        if not self._post(lambda: self._features.add(jobs)):
            raise EngineDeadError(_NOT_RUNNING)
        rows = await asyncio.gather(*(future for _, future in jobs))
        return np.stack(rows) if rows else np.empty((0, self._base.feature_dim), dtype=np.float32)

    async def drop_expert(self, digest: str) -> None:
        self._post(lambda: self._residency.drop(digest))

    def stats(self) -> EngineStats:
        return self._stats

    def check_integrity(self) -> tuple[str, str]:
        """sha256 of the pristine weights now, and of what the model runs with now. For tests; call when idle."""
        return self._merged.pristine_fingerprint(), self._merged.fingerprint()

    # -- called by the streams, on the event loop

    def _cancel(self, sequence: Sequence) -> None:
        self._post(lambda: self._end(sequence))

    def _closed(self) -> None:
        self._open -= 1

    # -- the engine's thread

    def _post(self, command: Command) -> bool:
        """Have a command run between two steps; False if the thread takes no more."""
        with self._door:
            if not self._closed_down:
                self._commands.put(command)
            return not self._closed_down

    def _run(self) -> None:
        if self._settings.threads is not None:
            torch.set_num_threads(self._settings.threads)
        failure: Exception = EngineDeadError("the server is shutting down")
        try:
            while not self._stopping:
                self._receive()
                self._features.serve()
                self._step()
                self._stats = self._snapshot()
                self._outbox.flush()
        except Exception:
            log.exception("the engine's thread has failed")
            failure = EngineDeadError("the engine has failed; restart the server")
        self._close_down(failure)

    def _close_down(self, failure: Exception) -> None:
        """Take no more commands, and tell everyone who waits: also those whose commands were on their way."""
        with self._door:
            self._closed_down = True
        while not self._commands.empty():
            try:
                self._commands.get()()
            except Exception:  # whatever broke the engine may break this too; those who wait must still be told
                log.exception("a command failed while the engine closed down")
        for sequence in self._held:
            sequence.emit(failure)
        self._features.fail(failure)
        self._outbox.flush()

    def _receive(self) -> None:
        """Run what was posted; sleep while there is nothing else to do."""
        idle = self._features.empty and self._scheduler.idle and self._outbox.empty
        while True:
            try:
                command = self._commands.get(block=idle)
            except queue.Empty:
                return
            idle = False
            command()

    def _admit(self, sequence: Sequence) -> None:
        self._held.add(sequence)

        def ready(error: SwitchyardError | None) -> None:
            if error is not None:
                self._held.discard(sequence)
                sequence.emit(error)
            elif sequence in self._held:
                self._scheduler.add(sequence)
            else:  # cancelled while its experts were loading
                self._residency.release(sequence.mix)

        self._residency.request(sequence.mix, ready)

    def _end(self, sequence: Sequence, error: SwitchyardError | None = None) -> None:
        """Finish or cancel a sequence and free what it holds; a second call does nothing."""
        if sequence not in self._held:
            return
        self._held.discard(sequence)
        if self._scheduler.remove(sequence):
            self._residency.release(sequence.mix)
        if error is not None:
            sequence.emit(error)

    def _step(self) -> None:
        plan = self._scheduler.schedule()
        if plan is None:
            return
        mix, work = plan
        try:
            self._merged.apply(mix, self._residency.experts)
            sampled = run_step(self._model, self._cache, work)
        except Exception:
            # One batch's failure (out of memory, a broken expert) ends that batch, not the server.
            log.exception("a step failed; its %d requests end with an error", len(work))
            for item in work:
                self._end(item.sequence, SwitchyardError("the engine failed on this batch; see the server's log"))
            return
        self._steps += 1
        self._postprocess(mix, work, sampled)

    def _postprocess(self, mix: Mix, work: list[Work], sampled: list[Sampled | None]) -> None:
        choices = iter(sampled)
        for item in work:
            sequence, samples = item.sequence, item.samples
            self._prompt_tokens += max(0, min(len(sequence.request.prompt) - sequence.computed, item.count))
            sequence.computed += item.count
            if not samples:
                continue
            choice = next(choices)
            if choice is None:
                name = "the base" if mix.is_base else "this mix of experts"
                self._end(sequence, ExpertUnavailableError(f"{name} produced values that are not finite"))
                continue
            self._generated_tokens += 1
            event = sequence.append(choice.token, choice.likelihood)
            if event.finish is not None:
                self._end(sequence)
            sequence.emit(event)

    def _snapshot(self) -> EngineStats:
        residency, merged = self._residency, self._merged
        running = self._scheduler.running
        return EngineStats(
            running=running,
            waiting=len(self._held) - running,
            kv_bytes_used=self._cache.used_bytes,
            kv_bytes_total=self._cache.total_bytes,
            resident_experts=residency.count,
            resident_bytes=residency.used_bytes,
            resident_bytes_limit=residency.budget_bytes,
            expert_loads=residency.loads,
            expert_evictions=residency.evictions,
            expert_load_seconds=residency.load_seconds,
            mix_switches=merged.switches,
            patch_seconds=merged.seconds,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated_tokens,
            preemptions=self._scheduler.preemptions,
            steps=self._steps,
        )
