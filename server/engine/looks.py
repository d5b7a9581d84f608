"""How large experts are: asked once each, on the loading thread, before room is made for them."""

from __future__ import annotations

from collections.abc import Callable, Collection
from concurrent.futures import Future
from functools import partial

from server.engine.expert import ExpertSource
from server.engine.fairness import Tenant
from server.engine.load_thread import Errand, Job, LoadThread

Then = Callable[[str, BaseException | None], None]


class Looks:
    """Experts that are being looked at, or have been: their sizes for good, and for a while what was read for that.

    For the engine's thread.

    Attributes:
        sizes: digest → bytes on the device.
    """

    def __init__(
        self, source: ExpertSource, thread: LoadThread, clock: Callable[[], float], keep_seconds: float
    ) -> None:
        """Args:
        keep_seconds: for so long a source may keep what it has read for a load that waits for room.
        """
        self._source = source
        self._thread = thread
        self._clock = clock
        self._keep_seconds = keep_seconds
        self._under_way: dict[str, Job[int]] = {}
        self._since: dict[str, float] = {}
        """Of whom the source may have kept something, and since when."""
        self.sizes: dict[str, int] = {}

    @property
    def under_way(self) -> Collection[str]:
        """Whose sizes have been asked for."""
        return self._under_way.keys()

    def begin(self, digest: str, tenant: Tenant, then: Then) -> None:
        """Ask for a size, unless it has been asked for; `then(digest, None)` is called when it is known, or nobody
        wants it any more, `then(digest, error)` if it cannot be had."""
        if digest not in self._under_way:
            done = partial(self._done, then)
            self._under_way[digest] = self._thread.submit(self._source.decoded_bytes, Errand.LOOK, digest, tenant, done)

    def call_off(self, digest: str) -> None:
        """Nobody waits for a size any more."""
        self._under_way[digest].call_off()

    def let_go(self, loading: Callable[[str], bool], next_ones: Collection[str]) -> None:
        """Have forgotten what was read of experts that have been loaded, or will not be soon.

        Args:
            loading: whether an expert has room on the device, and no more.
            next_ones: who will have it next.
        """
        for digest, since in [*self._since.items()]:
            is_soon = digest in next_ones and self._clock() - since < self._keep_seconds
            if not (is_soon or loading(digest)):
                del self._since[digest]
                self._source.let_go(digest)

    def _done(self, then: Then, digest: str, done: Future[int]) -> None:
        del self._under_way[digest]
        error = None if done.cancelled() else done.exception()
        if error is None and not done.cancelled():
            self.sizes[digest] = done.result()
            self._since[digest] = self._clock()
        then(digest, error)
