"""Experts that wait for room on the device are brought to host memory meanwhile, as far as there is room in that."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from functools import partial

from server.engine.expert import ExpertSource
from server.engine.load_thread import Job, LoadThread


class CalledOff(Exception):
    """What was being fetched has been given up: something else is more urgent, or nobody waits for it any more."""


class Ahead:
    """Has experts fetched one by one, in the order in which they will be asked for. For the engine's thread.

    It takes nothing from those who have the device: a fetch begins when nothing else waits for the loading thread, and
    gives way at the next tensor. In host memory whatever is on the device or waited for is spared; the rest was used
    longer ago than this will be. After the first expert that finds no room none is fetched, until somebody who waited
    has had his turn or gone.
    """

    def __init__(self, source: ExpertSource, thread: LoadThread, ended: Callable[[], None]) -> None:
        """Args:
        ended: is called on the engine's thread whenever another one can be fetched.
        """
        self._source = source
        self._thread = thread
        self._ended = ended
        self._job: Job[bool] | None = None
        self._waiting: frozenset[str] = frozenset()
        self._settled: set[str] = set()
        """What has been fetched, or cannot be, of what waits."""
        self._is_full = False

    def go_on(self, waiting: Sequence[str], on_device: Collection[str]) -> None:
        """Fetch the next one, unless one is under way.

        Args:
            waiting: what has no place on the device, in the order in which it will have one.
            on_device: what has, be it on its way there.
        """
        now = frozenset(waiting)
        if not self._waiting <= now:
            self._settled.clear()  # what made room for whoever had his turn may have taken theirs
            self._is_full = False
        self._waiting = now
        if self._job is not None:
            if self._job.digest not in now and self._job.digest not in on_device:
                self._job.call_off()
            return
        digest = next((digest for digest in waiting if digest not in self._settled), None)
        if digest is None or self._is_full:
            return
        fetch = partial(self._source.fetch, spared=now.union(on_device))
        self._job = self._thread.when_idle(fetch, digest, self._done)

    def _done(self, digest: str, done: Future[bool]) -> None:
        self._job = None
        if not done.cancelled() and not isinstance(done.exception(), CalledOff):
            self._settled.add(digest)  # whatever is wrong with it, its load will tell
            self._is_full = done.exception() is None and not done.result()
        self._ended()
