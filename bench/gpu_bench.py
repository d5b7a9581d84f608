"""The engine's own parts on the benchmark's base: batches in the middle of their answers, and their steps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from collections.abc import Sequence as Items

from bench.gpu_lab import Lab, Work
from bench.gpu_world import random_base
from server.engine.executor import Executor
from server.engine.expert import DecodedExpert
from server.engine.graphs import DecodeGraphs, GraphCapture, eagerly
from server.engine.kernels import Kernels
from server.engine.kv_cache import KVCache
from server.engine.model import BaseModel
from server.engine.paged_kernels import best_kernel, best_writer
from server.engine.scheduler import Batch
from server.engine.scheduler import Work as Share
from server.engine.sequence import Sequence
from server.engine.types import EngineRequest, SamplingParams
from store.mix import Mix

MOST_ROWS = 32
"""Of a decode step."""


class Bench:
    """A base of random weights and what runs it: as a server does, decode steps are CUDA graphs.

    Without a GPU they run over the same fixed tensors, uncaptured.

    Attributes:
        experts: those on the device, by digest.
        graphs: what runs decode steps.
        parameters_read: weights that a decode step reads at least once.
    """

    def __init__(self, lab: Lab, kernels: Kernels) -> None:
        self.lab = lab
        self.model: BaseModel = random_base(lab, lab.effort.size)
        self.cache = KVCache(self.model.kv_shape, lab.effort.kv_bytes, lab.device)
        self.cache.attend = best_kernel(self.cache, self.model.query_heads)
        self.cache.write = best_writer(self.cache)
        capture = GraphCapture(lab.device) if lab.on_gpu else eagerly
        tables = kernels if kernels.name == "triton" else None
        self.graphs = DecodeGraphs(self.model, self.cache, MOST_ROWS, capture, tables)
        self.executor = Executor(self.model, self.cache, kernels, fast=self.graphs)
        self.kernels = kernels
        self.experts: dict[str, DecodedExpert] = {}
        table = self.model.network.get_input_embeddings().weight  # type: ignore[operator]
        self.parameters_read = sum(p.numel() for p in self.model.parameters.values() if p is not table)

    def step_floor(self, rows: int, experts: Items[DecodedExpert] = ()) -> float:
        """Seconds that one decode step takes at least: weights, cache and deltas read once, or the products."""
        shape = self.model.kv_shape
        cached = rows * self.lab.effort.context * 2 * shape.layers * shape.kv_heads * shape.head_dim
        nbytes = (self.parameters_read + cached) * self.lab.dtype.itemsize
        nbytes += sum(expert.nbytes for expert in experts)
        return self.lab.floor(nbytes, 2 * rows * self.parameters_read)

    def batch(self, mixes: Items[Mix], *, mixed: bool = True) -> Batch:
        """One sequence for each of the mixes, that of one mix side by side, at the same place in its answer."""
        work = [Share(self._sequence(mix, number), 1) for number, mix in enumerate(sorted(mixes, key=_order))]
        return Batch(work, mixed)

    def step(self, batch: Batch, experts: Mapping[str, DecodedExpert] | None = None) -> Work:
        """The same decode step again and again: its sequences do not advance."""
        known = self.experts if experts is None else experts
        return lambda: self.executor.run(batch, known)

    def kernel_by_kernel(self, step: Work) -> Work:
        """The same step without a graph."""

        def run() -> None:
            self.executor.fast = None
            try:
                step()
            finally:
                self.executor.fast = self.graphs

        return run

    def captured(self, step: Work) -> Work:
        """The same step.

        Raises:
            AssertionError: it does not run as a graph.
        """
        before = self.graphs.replays
        step()
        if self.graphs.replays == before:
            raise AssertionError("the step could not be captured")
        return step

    def end(self, batch: Batch) -> None:
        """Give the batch's memory back, and let go of its experts."""
        for item in batch.work:
            self.cache.release(item.sequence)
        self.executor.mixed.forget()

    def _sequence(self, mix: Mix, number: int) -> Sequence:
        context = self.lab.effort.context
        prompt = tuple((number + 7 * place) % self.model.vocabulary for place in range(context + 1))
        sequence = Sequence(EngineRequest(prompt, SamplingParams(1, 0.0), mix), 1, emit=lambda _: None)
        if not self.cache.grow(sequence, context + 1):
            raise RuntimeError("the cache is too small for the batch")
        sequence.computed = context
        return sequence


def _order(mix: Mix) -> tuple[bool, str]:
    return not mix.is_base, mix.digest


def weights_of(experts: Items[DecodedExpert]) -> int:
    """How many weights the experts' deltas are for, all together."""
    return sum(math.prod(delta.shape) for expert in experts for delta in expert.tensors.values())
