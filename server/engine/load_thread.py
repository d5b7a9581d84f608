"""The one thread on which experts are looked at, loaded and kept: tenants take turns, and none holds up the others."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import Enum, auto
from functools import partial
from typing import Any, Generic, TypeVar

from server.engine.fairness import Tenant
from server.engine.tenant_lines import TenantLines

Result = TypeVar("Result")
Then = Callable[[str, Future[Result]], None]
GoOn = Callable[[], bool]


class Errand(Enum):
    """What is to be done with an expert."""

    LOOK = auto()
    """Learn its size. The tenant's turn goes on: the load that follows finds what has been read for it."""
    LOAD = auto()
    """Bring it to the device: a turn."""
    KEEP = auto()
    """Copy it to the host. Nobody waits for that."""
    FETCH = auto()
    """Bring it to the host, while there is nothing else to do."""


@dataclass(eq=False)
class Job(Generic[Result]):
    """An errand that waits for its turn, and later what became of it."""

    digest: str
    errand: Errand
    call: Callable[[], Result]
    future: Future[Result] = field(default_factory=Future)
    begun: bool = False
    is_called_off: bool = False

    @property
    def waits(self) -> bool:
        return not (self.begun or self.future.cancelled())

    def call_off(self) -> None:
        """Nobody needs it any more: it never begins; or ends soon, if it asks whether to go on."""
        self.is_called_off = True
        self.future.cancel()


class LoadThread:
    """Runs one job at a time: the next one of the tenant whose turn it is; what is to be done when idle, when nothing
    else waits. What became of it comes back through `post`."""

    def __init__(self, post: Callable[[Callable[[], None]], object]) -> None:
        """Args:
        post: runs a function on the engine's thread, soon.
        """
        self._post = post
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="expert-loader")
        self._lock = threading.Lock()
        self._lines: TenantLines[Job[Any]] = TenantLines()
        self._when_idle: Job[Any] | None = None
        self._is_closing = False

    def submit(
        self,
        call: Callable[[str], Result],
        errand: Errand,
        digest: str,
        tenant: Tenant,
        then: Then[Result] | None = None,
    ) -> Job[Result]:
        """Have something done with an expert when its turn comes, and `then` on the engine's thread."""
        job = self._job(partial(call, digest), errand, digest, then)
        with self._lock:
            self._lines.add(job, tenant)
        self._pool.submit(self._run_next)
        return job

    def share(self, job: Job[Any], tenant: Tenant) -> None:
        """One more tenant waits for a job: it is done when the first of them has the turn for it."""
        with self._lock:
            if job.waits:
                self._lines.add(job, tenant)

    def when_idle(self, call: Callable[[str, GoOn], Result], digest: str, then: Then[Result]) -> Job[Result]:
        """Have an expert fetched when nothing else waits. One at a time: the one before must have ended.

        Args:
            call: is given what to ask, now and then, whether to go on: not if something else has come to wait.
        """
        job = self._job(lambda: call(digest, lambda: self._may_go_on(job)), Errand.FETCH, digest, then)
        with self._lock:
            self._when_idle = job
        self._pool.submit(self._run_next)
        return job

    def close(self) -> None:
        """End, after the job in progress; what waits is not done."""
        self._is_closing = True
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _job(self, call: Callable[[], Result], errand: Errand, digest: str, then: Then[Result] | None) -> Job[Result]:
        job = Job(digest, errand, call)
        if then is not None:
            job.future.add_done_callback(lambda done: self._post(lambda: then(digest, done)))
        return job

    def _may_go_on(self, job: Job[Any]) -> bool:
        """What is fetched need not be given up for its own load."""
        if job.is_called_off or self._is_closing:
            return False
        with self._lock:
            others = (other for other in self._lines if other.digest != job.digest)
            return not any(other.waits and other.errand is not Errand.KEEP for other in others)

    def _run_next(self) -> None:
        """One call for each job; which job, is decided now."""
        job = self._next()
        if job is None or not job.future.set_running_or_notify_cancel():
            return
        try:
            result = job.call()
        except BaseException as error:
            job.future.set_exception(error)
            del job  # else the error's traceback keeps itself, and all that the job had at hand
        else:
            job.future.set_result(result)

    def _next(self) -> Job[Any] | None:
        with self._lock:
            while (first := self._lines.first()) is not None:
                job, tenant = first
                self._lines.remove(job, tenant, ends_turn=job.waits and job.errand is Errand.LOAD)
                if job.waits:
                    job.begun = True
                    return job
            idle, self._when_idle = self._when_idle, None
            return idle
