"""Resumable uploads of a running server: one piece at a time, and the newest client of an upload goes on with it."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from functools import partial
from pathlib import Path

from store.access import Caller
from store.errors import (
    ConflictError,
    ExpertFileError,
    InvalidRequestError,
    NotFoundError,
    StorageFullError,
    SwitchyardError,
)
from store.intake import Received
from store.upload import Upload
from store.uploads import Uploads

log = logging.getLogger(__name__)

_TIDY_SECONDS = 60.0
_YIELD_SECONDS = 5.0

Put = Callable[[Path], int]
"""Puts a file somewhere and tells its bytes."""
Pour = Callable[[AsyncIterator[bytes], Callable[[bytearray], object]], Awaitable[None]]


class Inbox:
    """Receives resumable uploads, and hands them on.

    Args:
        uploads: where they are kept.
        quarantine: where a whole one is put for those who check it.
    """

    def __init__(self, uploads: Uploads, quarantine: Path) -> None:
        self._uploads = uploads
        self._quarantine = quarantine
        self._receiving: dict[str, tuple[asyncio.Event, asyncio.Event]] = {}
        """Of uploads that are being received: to ask for an end, and to tell of it."""

    @property
    def max_bytes(self) -> int:
        """What all open uploads may have together."""
        return self._uploads.max_bytes

    async def create(self, filename: str, size: int, sha256: str | None, by: Caller) -> tuple[Upload, bool]:
        """See `Uploads.create`."""
        return await asyncio.to_thread(self._uploads.create, filename, size, sha256, by.tenant)

    async def get(self, upload_id: str, by: Caller) -> Upload:
        """The caller's upload of that id; see `Uploads.get`."""
        upload = await asyncio.to_thread(self._uploads.get, upload_id)
        if not _is_own(upload, by):
            raise NotFoundError(f"there is no upload {upload_id[:64]!r}", param="upload", code="upload_not_found")
        return upload

    async def list(self, by: Caller) -> Sequence[Upload]:
        """The caller's open uploads, the oldest first."""
        return [upload for upload in await asyncio.to_thread(self._uploads.list) if _is_own(upload, by)]

    def expires(self, upload: Upload) -> int:
        """When an upload is forgotten if nobody goes on with it, seconds since 1970."""
        return int(upload.touched + self._uploads.seconds)

    async def receive(
        self, upload_id: str, offset: int, pieces: AsyncIterator[bytes], pour: Pour, by: Caller
    ) -> Upload:
        """Append a piece. If another client still sends one, it is cut off: it is most likely this one's own, lost.

        Args:
            pour: gives the pieces to a function that may block.

        Raises:
            NotFoundError, ConflictError, InvalidRequestError, StoreError: as `Uploads.begin`, `end`, `Appending.write`.
        """
        await self.get(upload_id, by)
        await self._cut_off(upload_id)
        appending = await asyncio.to_thread(self._uploads.begin, upload_id, offset)
        stop, stopped = self._receiving[upload_id] = asyncio.Event(), asyncio.Event()
        try:
            async with aclosing(_until(stop, pieces)) as wanted:
                await pour(wanted, appending.write)
        except StorageFullError:
            await asyncio.to_thread(appending.take_back)
            raise
        finally:
            try:
                upload = await asyncio.to_thread(self._uploads.end, appending)
            finally:
                self._receiving.pop(upload_id, None)
                stopped.set()
        return upload

    async def delete(self, upload_id: str, by: Caller) -> None:
        """Forget an upload, also one that is being received."""
        await self.get(upload_id, by)
        await self._cut_off(upload_id)
        await asyncio.to_thread(self._uploads.delete, upload_id)

    @asynccontextmanager
    async def taken(self, upload_id: str, by: Caller) -> AsyncIterator[Received]:
        """A whole file, in quarantine. The upload is gone once it was used, and once it is known to be no use.

        Raises:
            NotFoundError, ConflictError, InvalidRequestError, StoreError: as `Uploads.take`.
        """
        await self.get(upload_id, by)
        target = self._quarantine / f"upload-{secrets.token_hex(8)}"
        file = await asyncio.to_thread(self._uploads.take, upload_id, target)
        try:
            yield file
        except ExpertFileError:
            await self._forget(upload_id)
            raise
        else:
            await self._forget(upload_id)
        finally:
            file.discard()

    @asynccontextmanager
    async def gathered(self, upload_ids: Sequence[str], by: Caller) -> AsyncIterator[dict[str, Put]]:
        """Whole files by their names, for who works on them all; the uploads are gone once that was begun.

        Raises:
            NotFoundError: one of them is not there (any more), or somebody else's.
            ConflictError: one of them is not whole yet.
            InvalidRequestError: two of them have one name.
        """
        files: dict[str, Put] = {}
        for upload_id in upload_ids:
            try:
                upload = await self.get(upload_id, by)
            except NotFoundError as error:
                raise NotFoundError(error.message, param="uploads", code=error.code) from error
            if upload.offset != upload.bytes:
                raise ConflictError(
                    f"{upload.filename} has {upload.offset} of {upload.bytes} bytes: send the rest first",
                    param="uploads",
                    code="upload_incomplete",
                )
            if upload.filename in files:
                raise InvalidRequestError(f"{upload.filename} is there twice", param="uploads")
            files[upload.filename] = partial(self._put, upload_id)
        yield files
        for upload_id in upload_ids:
            await self._forget(upload_id)

    def _put(self, upload_id: str, target: Path) -> int:
        return self._uploads.take(upload_id, target).bytes

    async def tidy(self) -> None:
        """Forget expired uploads, now and then, until cancelled."""
        while True:
            try:
                await asyncio.to_thread(self._uploads.expire)
            except SwitchyardError as error:
                log.warning("uploads cannot be tidied up just now: %s", error.message)
            await asyncio.sleep(_TIDY_SECONDS)

    async def _forget(self, upload_id: str) -> None:
        try:
            await asyncio.to_thread(self._uploads.delete, upload_id)
        except NotFoundError:  # somebody else has used or deleted it
            return

    async def _cut_off(self, upload_id: str) -> None:
        if (busy := self._receiving.get(upload_id)) is not None:
            stop, stopped = busy
            stop.set()
            try:
                await asyncio.wait_for(stopped.wait(), _YIELD_SECONDS)
            except TimeoutError:
                return  # the lock of the file will tell


def _is_own(upload: Upload, by: Caller) -> bool:
    return by.is_admin or (by.tenant is not None and upload.owner == by.tenant)


async def _until(stop: asyncio.Event, pieces: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
    """The pieces, until somebody else wants to go on."""
    stopping = asyncio.ensure_future(stop.wait())
    coming: asyncio.Future[bytes] | None = None
    try:
        while True:
            coming = asyncio.ensure_future(anext(pieces))
            await asyncio.wait({coming, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if not coming.done():
                raise ConflictError("another request goes on with this upload", code="upload_in_use")
            try:
                piece = coming.result()
            except StopAsyncIteration:
                return
            yield piece
    finally:
        stopping.cancel()
        if coming is not None:
            coming.cancel()
            await asyncio.wait({coming})
            if not coming.cancelled():
                coming.exception()  # it was told already, or nobody asks any more
