"""Routing features and embeddings on the engine's thread, in batches between two steps."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from server.engine.model import BaseModel
from server.engine.outbox import Outbox
from server.engine.prefill_budget import PrefillBudget
from server.engine.tenant_lines import TenantLines
from store.errors import SwitchyardError

log = logging.getLogger(__name__)

_BESIDE = 4
"""While somebody waits for an answer, a batch has at most this part of the tokens that it has else."""
_AHEAD = 4
"""Batches of routing features in a row while embeddings wait: every answer begins with routing, but embeddings must
come at all."""

Row = npt.NDArray[np.float32]
Job = tuple[list[int], "asyncio.Future[Row]"]
"""A prompt's token ids, and who waits for its features."""


class _Waiting:
    """Jobs of several callers, who have one of theirs computed in turn. What nobody waits for any more is left out."""

    def __init__(self) -> None:
        self._lines: TenantLines[Job] = TenantLines()

    def __bool__(self) -> bool:
        return self._lines.first() is not None

    def add(self, jobs: Iterable[Job], whose: str | None) -> None:
        for job in jobs:
            self._lines.add(job, whose)

    def take(self, room: int) -> list[Job]:
        """Jobs of so many tokens together, but one at least, if anybody waits for one."""
        taken: list[Job] = []
        while (first := self._lines.first()) is not None:
            job, whose = first
            is_wanted = not job[1].done()
            if is_wanted and taken and len(job[0]) > room:
                break
            self._lines.remove(job, whose, ends_turn=is_wanted)
            if is_wanted:
                taken.append(job)
                room -= len(job[0])
        return taken

    def clear(self) -> list[Job]:
        """All of them, which wait no more."""
        cleared = [*self._lines]
        self._lines = TenantLines()
        return cleared


class FeatureQueue:
    """Prompts whose features are wanted. For the engine's thread.

    Routing goes first: it waits for one batch of embeddings at most, however many are wanted.
    """

    def __init__(self, model: BaseModel, outbox: Outbox, prefill: PrefillBudget, step_tokens: int) -> None:
        """Args:
        prefill: what bounds them beside streams.
        step_tokens: most tokens of a batch.
        """
        self._model = model
        self._outbox = outbox
        self._prefill = prefill
        self._step_tokens = step_tokens
        self._routing, self._embeddings = _Waiting(), _Waiting()
        self._ahead = 0
        """Batches of routing features since embeddings began to wait, or had one."""

    @property
    def empty(self) -> bool:
        return not (self._routing or self._embeddings)

    def add(self, jobs: Iterable[Job]) -> None:
        """Prompts that are to be routed, or that experts are found by."""
        self._routing.add(jobs, None)

    def add_embeddings(self, jobs: Iterable[Job], tenant: str | None) -> None:
        """Texts that a tenant wants vectors of; tenants take turns."""
        self._embeddings.add(jobs, tenant)

    def serve(self, decoding: int, held: int) -> None:
        """Compute one batch, such that a library of exemplars cannot hold up running streams.

        Args:
            decoding: streams that run.
            held: requests that wait for an answer's next token, or its first.
        """
        jobs = [] if self.empty else self._next_batch(self._budget(decoding, held))
        if not jobs:
            return
        began = time.monotonic()
        self._compute(jobs)
        self._prefill.note_features(sum(len(prompt) for prompt, _ in jobs), time.monotonic() - began)

    def _budget(self, decoding: int, held: int) -> int:
        """Most tokens of the next batch."""
        if not held:
            return self._step_tokens
        bound = self._prefill.feature_tokens(decoding, held - decoding)
        most = self._step_tokens // _BESIDE
        return most if bound is None else min(most, bound)

    def _compute(self, jobs: Sequence[Job]) -> None:
        try:
            rows = self._model.features([prompt for prompt, _ in jobs]).numpy()
        except Exception as error:
            log.exception("routing features failed")
            self._reject(jobs, SwitchyardError(f"routing features failed: {type(error).__name__}"))
            return
        for (_, future), row in zip(jobs, rows, strict=True):
            self._outbox.call(_resolve, future, row)

    def fail(self, error: Exception) -> None:
        """Tell everyone who waits that nothing will come."""
        self._reject(self._routing.clear() + self._embeddings.clear(), error)

    def _next_batch(self, budget: int) -> list[Job]:
        if self._embeddings and (not self._routing or self._ahead >= _AHEAD):
            self._ahead = 0
            return self._embeddings.take(budget)
        self._ahead = self._ahead + 1 if self._embeddings else 0
        return self._routing.take(budget)

    def _reject(self, jobs: Sequence[Job], error: Exception) -> None:
        for _, future in jobs:
            self._outbox.call(_fail, future, error)


def _resolve(future: asyncio.Future[Row], row: Row) -> None:
    if not future.done():  # whoever waited may have gone
        future.set_result(row)


def _fail(future: asyncio.Future[Row], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
