"""The engine's thread: takes commands, schedules, runs steps and hands out tokens. It alone touches the model."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

from server.engine.bus import make_current
from server.engine.chooser import ModeChooser
from server.engine.cores import Cores
from server.engine.costs import calibrate
from server.engine.executor import Executor
from server.engine.feature_queue import FeatureQueue
from server.engine.graphs import decode_graphs
from server.engine.inspection import view
from server.engine.kernels import Kernels
from server.engine.kv_cache import KVCache
from server.engine.loader import ExpertLoader
from server.engine.model import BaseModel
from server.engine.native_steps import native_steps
from server.engine.options import BaseWeights, EngineSettings, Mode
from server.engine.outbox import Outbox
from server.engine.paged_kernels import best_kernel, best_writer
from server.engine.prefill_budget import PrefillBudget
from server.engine.residency import Residency, Ticket
from server.engine.sampler import Sampled
from server.engine.scheduler import Batch, Scheduler
from server.engine.sequence import Sequence
from server.engine.stats import EngineStats
from store.errors import EngineDeadError, ExpertUnavailableError, InvalidRequestError, SwitchyardError
from store.mix import Mix
from store.tiers import Tier

log = logging.getLogger(__name__)

_NEEDS_MERGING = (
    "this mix must be merged into the weights; a quantised base does not permit that, base_weights=full does"
)
_STEP_FAILED = "the engine failed on this batch; see the server's log"

Command = Callable[[], None]


class Worker:
    """Everything that runs on the engine's thread, and the queue that leads there.

    `post`, `alive`, `holdings` and `stats` may be used from any thread, and `view` by those who can bear a RuntimeError
    (`server.engine.inspection.beside`); all else belongs to the thread.
    """

    def __init__(
        self, model: BaseModel, kernels: Kernels, loader: ExpertLoader, outbox: Outbox, settings: EngineSettings
    ) -> None:
        """Raises InvalidRequestError if a setting makes no sense for this model; `param` names it."""
        self._settings = settings
        self._outbox, self._device = outbox, model.device
        self.cache = KVCache(model.kv_shape, settings.kv_bytes, model.device, reuse_prefixes=settings.prefix_cache)
        graphs = decode_graphs(settings.cuda_graphs, model, self.cache, settings.max_batch, kernels)
        native = None if graphs else native_steps(settings.native_steps, model, self.cache, kernels)
        self.executor = Executor(model, self.cache, kernels, settings.merged_bytes, graphs or native)
        self._loader, self._host, self._bus = loader, loader.host, loader.bus
        self.cache.attend = best_kernel(self.cache, model.query_heads)
        self.cache.write = best_writer(self.cache)
        self.residency = Residency(loader, settings.expert_bytes, post=self.post)
        self.prefill = PrefillBudget(settings.prefill_share)
        self.scheduler = Scheduler(
            self.cache,
            max_batch=settings.max_batch,
            step_tokens=settings.step_tokens,
            turn_steps=settings.turn_steps,
            prefill=self.prefill,
            shareable=lambda mix: self.executor.shareable(mix, self.residency.experts),
        )
        self._chooser: ModeChooser | None = None
        if settings.mode is Mode.AUTO:
            costs = calibrate(model, self.executor, kernels, settings.max_batch)
            self._chooser = ModeChooser(costs, settings.turn_steps, self.executor.shareable)
        self.features = FeatureQueue(model, outbox, self.prefill, settings.step_tokens)
        self._held: dict[Sequence, Ticket | None] = {}
        """Sequences whose experts are pinned or being waited for, and what cancels that."""
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._stopping = self._closed_down = False
        self._door = threading.Lock()
        self._busy_since: float | None = None
        """When the present step began, routing features before it included."""
        self._prompt_tokens = self._generated_tokens = self._steps = 0
        self._step_seconds = 0.0
        """What the last step took."""
        self.stats = self._snapshot()

    @property
    def alive(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread, after the step in progress, and wait for it; everyone who waits is told."""
        if self._thread is None:
            return

        def halt() -> None:
            self._stopping = True

        self.post(halt)
        self._thread.join()
        self.residency.close()
        self._host.close()

    def post(self, command: Command) -> bool:
        """Have a command run between two steps; False if the thread takes no more."""
        with self._door:
            if not self._closed_down:
                self._commands.put(command)
            return not self._closed_down

    def holdings(self) -> dict[Tier, frozenset[str]]:
        """Digests of the experts that are decoded, by where. From any thread: copying a dict's keys is one step."""
        return {Tier.DEVICE: frozenset(self.residency.experts), Tier.HOST: self._host.digests()}

    def view(self) -> dict[str, Any]:
        """What is going on, for people; see `server.engine.inspection.view`."""
        return view(self.scheduler, self.residency, self.executor, self._busy_since)

    def _run(self) -> None:
        make_current(self._device)
        cores = Cores(self._settings.threads)
        failure: Exception = EngineDeadError("the server is shutting down")
        try:
            while not self._stopping:
                self._receive()
                cores.share(self._loader.is_decoding)
                self._busy_since = time.monotonic()
                self.features.serve(self.scheduler.decoding, len(self._held))
                self._step()
                self.stats = self._snapshot()
                self._outbox.flush()
                self._busy_since = None
        except Exception:
            log.exception("the engine's thread has failed")
            failure = EngineDeadError("the engine has failed; restart the server")
        cores.share(False)  # for whatever else this process computes
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
        self.features.fail(failure)
        self._outbox.flush()

    def _receive(self) -> None:
        """Run what was posted; sleep while there is nothing else to do, and until a load that is about to end has."""
        idle = self.features.empty and self.scheduler.idle and self._outbox.empty
        while True:
            patience = 0.0 if idle else self._bus.patience(self._step_seconds)
            try:
                command = self._commands.get(block=idle or patience > 0, timeout=patience or None)
            except queue.Empty:
                return
            idle = False
            command()

    def admit(self, sequence: Sequence) -> None:
        """Take in a request; it is scheduled once its experts are resident."""
        self._held[sequence] = None

        def ready(error: SwitchyardError | None) -> None:
            if error is not None:
                self.end(sequence, error)
            elif sequence in self._held and self._may_run(sequence.mix):
                sequence.granted = time.monotonic()
                self.scheduler.add(sequence)
            else:  # cancelled while its experts were loading, or to be refused now that they are known
                self.end(sequence, ExpertUnavailableError(_NEEDS_MERGING, param="model"))
                self.residency.release(sequence.mix)

        ticket = self.residency.request(sequence.mix, ready, sequence.request.tenant)
        if sequence in self._held:
            self._held[sequence] = ticket

    def _may_run(self, mix: Mix) -> bool:
        """Whether it needs no merging, or may be merged."""
        return self._settings.base_weights is BaseWeights.FULL or self.executor.shareable(mix, self.residency.experts)

    def end(self, sequence: Sequence, error: SwitchyardError | None = None) -> None:
        """Finish or cancel a sequence and free what it holds; a second call does nothing."""
        if sequence not in self._held:
            return
        ticket = self._held.pop(sequence)
        if error is not None:
            self.cache.withdraw(sequence)
        if self.scheduler.remove(sequence):
            self.executor.mixed.forget()
            self.residency.release(sequence.mix)
        elif ticket is not None:
            self.residency.cancel(ticket)
        if error is not None:
            sequence.emit(error)

    def _step(self) -> None:
        if self.scheduler.idle:
            return
        batch = self.scheduler.schedule(mixed=self._choose() is Mode.MIXED)
        for sequence in self.scheduler.failed:
            self.end(sequence, SwitchyardError(_STEP_FAILED))
        if batch is not None:
            self._execute(batch)

    def _choose(self) -> Mode:
        if self._chooser is None:
            return self._settings.mode
        merged = self.executor.merged
        return self._chooser.choose(self.scheduler.demand(), self.residency.experts, merged.built, merged.room)

    def _execute(self, batch: Batch) -> None:
        began, patched = time.monotonic(), self.executor.merged.seconds
        try:
            sampled = self.executor.run(batch, self.residency.experts)
        except Exception:
            parts = batch.by_mix()
            if len(parts) > 1:
                log.exception("a step failed; its mixes run again one by one")
                for part in parts:
                    self._execute(part)
                return
            # One mix's failure (out of memory, a broken expert) ends its share of the step, not the server.
            log.exception("a step failed; its %d requests end with an error", len(batch.work))
            for item in batch.work:
                self.end(item.sequence, SwitchyardError(_STEP_FAILED))
            return
        self._steps += 1
        self._step_seconds = time.monotonic() - began
        patched = self.executor.merged.seconds - patched
        self.prefill.note_step(*batch.rows(), self._step_seconds - patched)
        for item in batch.work:
            if not item.sequence.is_timed:
                item.sequence.scheduled = item.sequence.scheduled or began
                item.sequence.patching += patched
        self._postprocess(batch, sampled)

    def _postprocess(self, batch: Batch, sampled: list[Sampled | None]) -> None:
        choices = iter(sampled)
        for item in batch.work:
            sequence, samples = item.sequence, item.samples
            self._prompt_tokens += max(0, min(len(sequence.request.prompt) - sequence.computed, item.count))
            sequence.computed += item.count
            if not samples:
                continue
            choice = next(choices)
            if choice is None:
                name = "the base" if sequence.mix.is_base else "this mix of experts"
                self.end(sequence, ExpertUnavailableError(f"{name} produced values that are not finite"))
                continue
            if sequence.grammar is not None and sequence.grammar.is_error():  # a step's limit was exceeded
                self.end(sequence, InvalidRequestError("the grammar is too complex to follow"))
                continue
            self._generated_tokens += 1
            event = sequence.told(sequence.append(choice.token, choice.likelihood))
            if event.finish is not None:
                self.end(sequence)
            sequence.emit(event)

    def _snapshot(self) -> EngineStats:
        residency, executor, running = self.residency, self.executor, self.scheduler.running
        return EngineStats(
            running=running,
            waiting=len(self._held) - running,
            kv_bytes_used=self.cache.used_bytes,
            kv_bytes_kept=self.cache.kept_bytes,
            kv_bytes_total=self.cache.total_bytes,
            mix_switches=executor.merged.switches,
            patches=executor.merged.patches,
            patch_seconds=executor.merged.seconds,
            merged_steps=executor.merged_steps,
            mixed_steps=executor.mixed_steps,
            mixed_seconds=executor.mixed.seconds,
            mode_changes=0 if self._chooser is None else self._chooser.changes,
            mode_is_mixed=int((self._settings if self._chooser is None else self._chooser).mode is Mode.MIXED),
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self.cache.reused_tokens,
            generated_tokens=self._generated_tokens,
            preemptions=self.scheduler.preemptions,
            steps=self._steps,
            tiers=(residency.stats(), self._host.stats()),
        )
