"""Routing features on the engine's thread, in batches between two steps."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from server.engine.model import BaseModel
from server.engine.outbox import Outbox
from server.engine.prefill_budget import PrefillBudget
from store.errors import SwitchyardError

log = logging.getLogger(__name__)

_BESIDE = 4
"""While somebody waits for an answer, a batch has at most this part of the tokens that it has else."""

Row = npt.NDArray[np.float32]
Job = tuple[list[int], "asyncio.Future[Row]"]
"""A prompt's token ids, and who waits for its features."""


class FeatureQueue:
    """Prompts whose features are wanted. For the engine's thread."""

    def __init__(self, model: BaseModel, outbox: Outbox, prefill: PrefillBudget, step_tokens: int) -> None:
        """Args:
        prefill: what bounds them beside streams.
        step_tokens: most tokens of a batch.
        """
        self._model = model
        self._outbox = outbox
        self._prefill = prefill
        self._step_tokens = step_tokens
        self._jobs: deque[Job] = deque()

    @property
    def empty(self) -> bool:
        return not self._jobs

    def add(self, jobs: Sequence[Job]) -> None:
        self._jobs.extend(jobs)

    def serve(self, decoding: int, held: int) -> None:
        """Compute one batch, oldest first, such that a library of exemplars cannot hold up running streams.

        Args:
            decoding: streams that run.
            held: requests that wait for an answer's next token, or its first.
        """
        jobs = self._next_batch(self._budget(decoding, held)) if self._jobs else []
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
        self._reject(self._jobs, error)
        self._jobs.clear()

    def _next_batch(self, budget: int) -> list[Job]:
        jobs: list[Job] = []
        room = budget
        while self._jobs and (not jobs or room >= len(self._jobs[0][0])):
            jobs.append(self._jobs.popleft())
            room -= len(jobs[-1][0])
        return jobs

    def _reject(self, jobs: Sequence[Job], error: Exception) -> None:
        for _, future in jobs:
            self._outbox.call(_fail, future, error)


def _resolve(future: asyncio.Future[Row], row: Row) -> None:
    if not future.done():  # whoever waited may have gone
        future.set_result(row)


def _fail(future: asyncio.Future[Row], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
