"""What the router has been told of the registry's experts: taught at once where that is quick, else a little later."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from enum import StrEnum

from router.router import Router
from store.errors import EngineDeadError, SwitchyardError
from store.record import ExpertRecord
from store.registry import Registry

log = logging.getLogger(__name__)


class Routing(StrEnum):
    """Whether prompts are routed to an expert."""

    NONE = "none"
    """It has no exemplars: it is reached by name."""
    PENDING = "pending"
    READY = "ready"


class Teaching:
    """Teaches the router. Changes of one name come one after the other: see to that.

    Args:
        patience: seconds that a publication waits for the router; what takes longer goes on behind its back.
    """

    def __init__(self, registry: Registry, router: Router, patience: float) -> None:
        self._registry = registry
        self._router = router
        self._patience = patience
        self.known: dict[str, ExpertRecord] = {}
        """What the router has been told of."""
        self.unlearned: set[str] = set()
        """What it could not be told of yet."""
        self._behind: dict[str, asyncio.Task[None]] = {}
        """What is being taught behind the back of its publication."""

    def is_stale(self, record: ExpertRecord) -> bool:
        """Whether the router must be told of a record (again)."""
        return _taught_by(self.known.get(record.name)) != _taught_by(record) or record.name in self.unlearned

    def routing(self, record: ExpertRecord) -> Routing:
        """Whether prompts are routed to an expert."""
        if not record.exemplar_count:
            return Routing.NONE
        return Routing.PENDING if record.name in self._behind or self.is_stale(record) else Routing.READY

    async def learn(self, record: ExpertRecord) -> None:
        """Take up what is in the registry; where that fails it is logged, and `unlearned`.

        Raises:
            EngineDeadError: the engine has failed.
        """
        try:
            await self._tell(record, await self._prompts(record))
        except EngineDeadError:
            raise
        except SwitchyardError as error:
            log.warning("the expert %s will not be routed to: %s", record.name, error.message)
            self.unlearned.add(record.name)
        else:
            self.unlearned.discard(record.name)
        self.known[record.name] = record

    async def begin(self, record: ExpertRecord) -> asyncio.Task[None]:
        """Begin to teach what has just been published; what is changed from here on overtakes it.

        Raises:
            ExpertUnavailableError: its exemplars are gone already.
        """
        teaching = asyncio.create_task(self._tell(record, await self._prompts(record)))
        await asyncio.sleep(0)  # its first step, which makes it known to the router that it is on its way
        self.known[record.name] = record
        self.unlearned.discard(record.name)
        return teaching

    async def settle(self, record: ExpertRecord, teaching: asyncio.Task[None]) -> None:
        """Wait for what was begun, as long as patience lasts; the rest is done behind.

        Raises:
            SwitchyardError: it has failed meanwhile; nothing goes on.
        """
        try:
            await asyncio.wait({teaching}, timeout=self._patience)
            if teaching.done():
                await teaching
        except BaseException:
            teaching.cancel()
            self.known.pop(record.name, None)  # whatever is there then is looked at again
            raise
        if not teaching.done():
            self._behind[record.name] = teaching
            teaching.add_done_callback(lambda task: self._done(record, task))

    async def stand(self, record: ExpertRecord, teaching: asyncio.Task[None]) -> None:
        """As `settle`, of a change that stands whatever the router makes of it: where it fails, it is tried again."""
        self._behind[record.name] = teaching
        teaching.add_done_callback(lambda task: self._done(record, task))
        await asyncio.wait({teaching}, timeout=self._patience)

    def forget(self, record: ExpertRecord) -> None:
        """Route nothing to an expert any more."""
        self.known.pop(record.name, None)
        self.unlearned.discard(record.name)
        self._router.remove_expert(record.name)

    def _done(self, record: ExpertRecord, teaching: asyncio.Task[None]) -> None:
        if self._behind.get(record.name) is teaching:
            del self._behind[record.name]
        if not teaching.cancelled() and (error := teaching.exception()) is not None:
            log.warning("the expert %s is not routed to yet: %s", record.name, error)
            if self.known.get(record.name) == record:
                self.unlearned.add(record.name)

    async def _prompts(self, record: ExpertRecord) -> Sequence[str]:
        return await asyncio.to_thread(self._registry.exemplars, record) if record.exemplar_count else ()

    async def _tell(self, record: ExpertRecord, prompts: Sequence[str]) -> None:
        # Without prompts it is forgotten.
        await self._router.add_expert(record.name, record.digest, prompts, record.exemplars_digest or record.digest)


def _taught_by(record: ExpertRecord | None) -> tuple[str, str | None] | None:
    """What the router learns an expert from: other words about it change nothing."""
    return None if record is None else (record.digest, record.exemplars_digest)
