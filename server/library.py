"""The experts of a running server: what is published is in the registry at once, and soon known to the router."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from router.router import Router
from server.engine.types import Engine
from server.teaching import Routing, Teaching
from store.access import OPERATOR, AccessChange, Caller
from store.alias import Alias
from store.exemplar_changes import Choice
from store.expert_file import ExpertHeader, read_header
from store.intake import Received, receiving
from store.layers import Spent, spent_by_layer
from store.ownership import NO_QUOTA, Quota, check_owned
from store.record import ExpertRecord
from store.registry import Registry
from store.trust import Signer

_RETRY_SECONDS = 5.0
_CHECKED_AT_ONCE = 2
"""A check takes a core and some memory; the rest of the uploads wait."""


class Library:
    """Publishes and removes experts, one change at a time.

    Args:
        quarantine: where bytes wait until they are known to be sound.
        check: tells a sound expert file's header, or raises what is wrong with it; may block.
        max_upload_bytes: size of the largest expert file.
        quota_of: what a caller's tenant may keep.
        patience: seconds that a publication waits for the router; what takes longer goes on behind its back.
    """

    def __init__(
        self,
        registry: Registry,
        router: Router,
        engine: Engine,
        quarantine: Path,
        check: Callable[[Path], ExpertHeader],
        *,
        max_upload_bytes: int,
        patience: float,
        quota_of: Callable[[Caller], Quota] = lambda _: NO_QUOTA,
    ) -> None:
        self._registry = registry
        self._engine = engine
        self.quarantine = quarantine
        self.max_upload_bytes = max_upload_bytes
        self._check = check
        self._quota_of = quota_of
        # Threads of their own: checks of hostile files may take long, and everything else needs threads too.
        self._checking = ThreadPoolExecutor(_CHECKED_AT_ONCE, thread_name_prefix="check")
        # A publication and a removal of one name, interleaved, would leave registry and router of two minds.
        self._changing = asyncio.Lock()
        self._aligned: int | None = None
        self._teaching = Teaching(registry, router, patience)
        self._retry_at = 0.0

    async def align(self) -> None:
        """Tell the router and the engine what has come and gone in the registry, whoever published or removed it.

        An expert whose exemplars cannot be read is logged, left out, and tried again later.
        """
        edition = self._registry.edition
        again = bool(self._teaching.unlearned) and time.monotonic() > self._retry_at
        if edition == self._aligned and not again:
            return
        async with self._changing:
            present = {record.name: record for record in await self.list(OPERATOR)}
            for name in self._teaching.known.keys() - present.keys():
                await self._forget(self._teaching.known[name])
            for name, record in present.items():
                if self._teaching.is_stale(record):
                    await self._teaching.learn(record)
                self._teaching.known[name] = record
            self._aligned, self._retry_at = edition, time.monotonic() + _RETRY_SECONDS

    async def look(self) -> None:
        """Bring router and engine in step with the registry, and heal what the store has lost."""
        await asyncio.to_thread(self._registry.restore_lost)
        await self.align()

    async def publish(
        self,
        file: Received,
        *,
        name: str | None,
        exemplars: Sequence[str] | None,
        by: Caller,
        replace: bool = False,
        signature: str | None = None,
    ) -> tuple[ExpertRecord, bool]:
        """Check a file of the quarantine and publish it: live when this returns. The caller discards the file.

        Routing learns it too, within the library's patience, or a little later: exemplars take time to read.

        Args:
            by: who publishes it; a new name is its tenant's.
            replace: what the name points to now becomes an earlier version; answers in progress finish on it.

        Returns:
            The record, and whether anything is new.

        Raises:
            InvalidRequestError, UntrustedError, ConflictError, NotPermittedError, StoreError: as `Registry.publish`.
            SwitchyardError: the router could not learn its exemplars, soon said so, and it is not published.
        """
        self._registry.trust.check(file.digest, signature)  # costs less than what follows
        header = await asyncio.get_running_loop().run_in_executor(self._checking, self._check, file.path)
        async with self._changing:
            record, created = await asyncio.to_thread(
                self._registry.publish,
                file.path,
                name=name,
                exemplars=exemplars,
                replace=replace,
                signature=signature,
                header=header,
                digest=file.digest,
                by=by,
                quota=self._quota_of(by),
            )
            try:
                teaching = await self._teaching.begin(record)
            except BaseException:
                await self._undo(record, created)
                raise
        try:
            await self._teaching.settle(record, teaching)
        except BaseException:
            await self._undo(record, created)
            raise
        return record, created

    def check_unsigned(self) -> None:
        """Raise UntrustedError where experts must be signed: what the server makes itself is not."""
        self._registry.trust.check("", None)

    def routing(self, record: ExpertRecord) -> Routing:
        """Whether prompts are routed to an expert."""
        return self._teaching.routing(record)

    async def roll_back(self, name: str, digest: str | None, by: Caller) -> ExpertRecord:
        """Let a name point to an earlier version again; answers in progress finish.

        Raises:
            NotFoundError: there is no such expert or version.
        """
        async with self._changing:
            record = await asyncio.to_thread(self._registry.roll_back, name, digest, by)
            await self._teaching.learn(record)
        return record

    async def describe(
        self,
        name: str,
        *,
        description: str | None,
        tags: Sequence[str] | None,
        metadata: Mapping[str, str | None] | None,
        by: Caller,
    ) -> ExpertRecord:
        """Change what is said about an expert; see `Registry.describe`."""
        return await asyncio.to_thread(
            self._registry.describe, name, description=description, tags=tags, metadata=metadata, by=by
        )

    async def set_exemplars(self, name: str, choose: Choice, by: Caller) -> ExpertRecord:
        """Let prompts find an expert by other exemplars; see `Registry.set_exemplars`.

        Routing learns them within the library's patience, or a little later.
        """
        async with self._changing:
            record = await asyncio.to_thread(self._registry.set_exemplars, name, choose, by)
            teaching = await self._teaching.begin(record) if self._teaching.is_stale(record) else None
        if teaching is not None:
            await self._teaching.stand(record, teaching)
        return record

    async def exemplars(self, name: str, by: Caller) -> tuple[ExpertRecord, Sequence[str]]:
        """An expert of the caller's, and the prompts that it is found by.

        Raises:
            NotFoundError: there is none for this caller.
            NotPermittedError: it is not the caller's.
        """
        record = await self.get(name, by)
        check_owned(record, by)
        return record, await asyncio.to_thread(self._registry.exemplars, record)

    async def put_alias(self, name: str, target: str, by: Caller) -> tuple[Alias, bool]:
        """Let an alias point to an expert; see `Aliases.put`."""
        return await asyncio.to_thread(self._registry.alias_changes.put, name, target, by)

    def signer(self, record: ExpertRecord) -> Signer | None:
        """Who signed an expert; see `Trust.signer`."""
        return self._registry.trust.signer(record)

    async def remove_alias(self, name: str, by: Caller) -> Alias:
        """Take an alias away; see `Aliases.remove`."""
        return await asyncio.to_thread(self._registry.alias_changes.remove, name, by)

    async def alias(self, name: str, by: Caller) -> Alias:
        """The alias of that name.

        Raises:
            NotFoundError: there is none.
        """
        return await asyncio.to_thread(self._registry.alias, name, by)

    async def aliases(self, by: Caller) -> Sequence[tuple[Alias, ExpertRecord]]:
        """The aliases that exist for the caller by name, each with its expert."""
        return await asyncio.to_thread(self._registry.aliases, by)

    def aliases_of(self, name: str) -> Sequence[str]:
        """Aliases of an expert, as of the last look at the registry."""
        return self._registry.aliases_of(name)

    async def set_access(self, name: str, change: AccessChange, by: Caller) -> ExpertRecord:
        """Let an expert be seen by others, or be somebody else's; see `Registry.set_access`."""
        return await asyncio.to_thread(self._registry.set_access, name, change, by)

    async def remove(self, name: str, by: Caller, *, force: bool = False) -> ExpertRecord:
        """Unpublish an expert; answers in progress finish.

        Args:
            force: its aliases go too.

        Raises:
            NotFoundError: there is none of that name.
            ConflictError: it has aliases, or the name is one.
        """
        async with self._changing:
            record = await asyncio.to_thread(self._registry.remove, name, by, force=force)
            await self._forget(record)
        return record

    async def list(self, by: Caller) -> list[ExpertRecord]:
        """The experts that exist for the caller, by name."""
        return await asyncio.to_thread(self._registry.list, by)

    async def page(
        self, *, after: str, limit: int, matching: str, tags: Collection[str] = (), by: Caller
    ) -> tuple[Sequence[ExpertRecord], bool]:
        """Some experts by name, and whether there are more; see `Registry.page`."""
        return await asyncio.to_thread(
            self._registry.page, after=after, limit=limit, matching=matching, tags=tags, by=by
        )

    async def get(self, name: str, by: Caller) -> ExpertRecord:
        """The expert of that name.

        Raises:
            NotFoundError: there is none for this caller.
        """
        return await asyncio.to_thread(self._registry.get, name, by)

    async def header(self, record: ExpertRecord) -> ExpertHeader:
        """What the expert's file says about itself.

        Raises:
            ExpertUnavailableError: its bytes are gone or damaged.
        """
        return await asyncio.to_thread(lambda: read_header(self._registry.expert_path(record.digest)))

    async def layers(self, record: ExpertRecord) -> Mapping[str, Spent]:
        """Where the expert's file spends its bits, by layer; raises as `header`."""
        return await asyncio.to_thread(lambda: spent_by_layer(self._registry.expert_path(record.digest)))

    async def stack(self, name: str, by: Caller) -> Sequence[str]:
        """Digests of an expert that another one may stand on, and of what is below it; see `Catalogue.stack`."""
        return await asyncio.to_thread(self._registry.stack, name, by)

    async def copy(self, digest: str, target: Path) -> None:
        """Put the bytes of an expert somewhere; raises as `header`."""
        data = await asyncio.to_thread(self._registry.expert_bytes, digest)
        with receiving():
            await asyncio.to_thread(target.write_bytes, data)

    async def _forget(self, record: ExpertRecord) -> None:
        self._teaching.forget(record)
        if all(other.digest != record.digest for other in await self.list(OPERATOR)):
            await self._engine.drop_expert(record.digest)

    async def _undo(self, record: ExpertRecord, created: bool) -> None:
        if created:
            await asyncio.to_thread(self._registry.undo, record)
