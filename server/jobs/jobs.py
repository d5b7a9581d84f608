"""Runs jobs, one at a time, each in a process of its own; publishes what they make."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import os
import shutil
import signal
import sys
import time
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server.jobs.book import JobBook
from server.jobs.job import Job, JobRequest, JobState, Progress, next_of
from server.jobs.process import environment
from server.library import Library
from store.access import Caller
from store.errors import ConflictError, NotFoundError, SwitchyardError
from store.expert_file import digest_of
from store.intake import Received

log = logging.getLogger(__name__)

_MODULE = f"{__package__}.process"
_LOOK_SECONDS = 0.2
_EXIT_SECONDS = 30.0
"""From a process's last word to its end."""
_IDLE_SECONDS = 1.0
_SILENT_SECONDS = 15.0
"""Less than proxies and clients wait for the next piece of an answer."""
_LINE_BYTES = 1 << 24
"""Most of what a job's process may say at once."""


@dataclass(frozen=True)
class JobLimits:
    """What the process of a job may use.

    Attributes:
        memory: bytes of data.
        file_bytes: size of the largest file it may write.
        seconds: time.
    """

    memory: int
    file_bytes: int
    seconds: int


class Jobs:
    """The jobs of one server.

    Args:
        book: where they are kept.
        library: where experts are published.
        base: the base's checkpoint folder.
        cache: where its fingerprint is remembered.
        limits: of each job, asked for when it begins.
    """

    def __init__(
        self, book: JobBook, library: Library, base: Path, cache: Path, limits: Callable[[], JobLimits]
    ) -> None:
        self._book = book
        self._library = library
        self._base = base
        self._cache = cache
        self._limits = limits
        self._running: Job | None = None
        self._wake = asyncio.Event()

    async def submit(self, request: JobRequest, by: Caller, files: Mapping[str, Callable[[Path], int]]) -> Job:
        """Queue a job; see `JobBook.create`.

        Raises:
            UntrustedError: experts must be signed here.
        """
        self._library.check_unsigned()
        job = await asyncio.to_thread(self._book.create, request, by, files)
        self._wake.set()
        return job

    async def get(self, job_id: str, by: Caller) -> Job:
        """The job of that id, with its progress.

        Raises:
            NotFoundError: there is none (any more), or it is somebody else's.
        """
        job = await asyncio.to_thread(self._book.get, job_id)
        if not job.is_seen_by(by):
            raise NotFoundError(f"there is no job {job_id[:64]!r}", param="job", code="job_not_found")
        return self._with_progress(job)

    async def list(self, by: Caller) -> Sequence[Job]:
        """The caller's jobs, the latest first."""
        jobs = await asyncio.to_thread(self._book.list)
        return [self._with_progress(job) for job in reversed(jobs) if job.is_seen_by(by)]

    async def cancel(self, job_id: str, by: Caller) -> Job:
        """End a job that waits or runs.

        Raises:
            NotFoundError: there is none (any more), or it is somebody else's.
            ConflictError: it has ended.
        """
        job = await self.get(job_id, by)
        if job.state.is_final:
            raise ConflictError(f"the job has {job.state} already", param="job", code="job_ended")
        await asyncio.to_thread(self._book.cancel, job)
        self._wake.set()
        return job

    async def watch(self, job_id: str, by: Caller) -> AsyncIterator[Job]:
        """The job now, whenever it has changed, and now and then all the same, until it has ended: whoever watches one
        that waits for hours must hear that the server is still there."""
        shown: Job | None = None
        silent_since = 0.0
        while shown is None or not shown.state.is_final:
            job = await self.get(job_id, by)
            if job != shown or time.monotonic() - silent_since > _SILENT_SECONDS:
                yield job
                silent_since = time.monotonic()
            shown = job
            if not job.state.is_final:
                await asyncio.sleep(_LOOK_SECONDS)

    async def run(self) -> None:
        """Run jobs until cancelled. Of several servers that share a folder one does it."""
        try:
            while not await asyncio.to_thread(self._book.may_run):
                await asyncio.sleep(_IDLE_SECONDS)
            await asyncio.to_thread(self._book.recover)
            while True:
                self._wake.clear()
                try:
                    if not await self._next():
                        await asyncio.wait_for(self._wake.wait(), _IDLE_SECONDS)
                except TimeoutError:
                    continue
                except SwitchyardError as error:
                    log.warning("jobs must wait: %s", error.message)
                    await asyncio.sleep(_IDLE_SECONDS)
        finally:
            self._book.close()

    def _with_progress(self, job: Job) -> Job:
        running = self._running
        is_this = running is not None and running.id == job.id and not job.state.is_final
        return dataclasses.replace(job, progress=running.progress) if is_this and running is not None else job

    async def _next(self) -> bool:
        """Run the job that is next; False where there is none."""
        job = next_of(await asyncio.to_thread(self._book.list))
        if job is None:
            return False
        if self._book.is_cancelled(job):
            await self._end_cancelled(job)
            return True
        job = dataclasses.replace(job, state=JobState.RUNNING, started=int(time.time()), attempts=job.attempts + 1)
        await asyncio.to_thread(self._book.save, job)
        self._running = job
        try:
            await self._work(job)
        except SwitchyardError as error:
            await asyncio.to_thread(self._book.fail, job, error.message, error.code, error.param)
        except Exception:
            log.exception("the job %s has failed", job.id)
            await asyncio.to_thread(self._book.fail, job, "the server failed on this job", "internal_error")
        finally:
            self._running = None
        return True

    async def _work(self, job: Job) -> None:
        workplace = await asyncio.to_thread(self._book.workplace, job)
        below = await self._below(job, workplace)
        said = await self._process(job, workplace, below)
        if said is None:
            await self._end_cancelled(job)
        elif "report" in said:
            await self._publish(job, workplace / "expert", said["report"])
        else:
            error = said["error"]
            await asyncio.to_thread(self._book.fail, job, error["message"], error["code"], error["param"])

    async def _below(self, job: Job, workplace: Path) -> Sequence[Path]:
        """Copies of what the expert will stand on: a store may let go of its own while the job runs.

        Raises:
            ExpertUnavailableError: one is gone.
        """
        files = []
        for digest in job.request.stands_on:
            files.append(workplace / digest)
            await self._library.copy(digest, files[-1])
        return files

    async def _publish(self, job: Job, path: Path, report: Mapping[str, Any]) -> None:
        self._show(job, "publish", 0, 1)
        digest = await asyncio.to_thread(digest_of, path)
        target = self._library.quarantine / job.id
        file = Received(target, digest, path.stat().st_size)
        try:
            await asyncio.to_thread(shutil.move, path, target)
            record, _ = await self._library.publish(
                file, name=job.request.name, exemplars=None, by=job.by, replace=job.request.replace
            )
        finally:
            file.discard()
        done = dataclasses.replace(
            job,
            state=JobState.SUCCEEDED,
            finished=int(time.time()),
            expert={"id": record.name, "digest": record.digest},
            report=report,
        )
        await asyncio.to_thread(self._book.save, done)

    async def _end_cancelled(self, job: Job) -> None:
        ended = dataclasses.replace(job, state=JobState.CANCELLED, finished=int(time.time()))
        await asyncio.to_thread(self._book.save, ended)

    async def _process(self, job: Job, workplace: Path, below: Sequence[Path]) -> dict[str, Any] | None:
        """What a job's process said last; None where it was cancelled."""
        limits = self._limits()
        task = {
            "base": str(self._base),
            "input": str(self._book.input_of(job)),
            "out": str(workplace / "expert"),
            "cache": str(self._cache),
            "memory": limits.memory,
            "file_bytes": limits.file_bytes,
            "cpu_seconds": limits.seconds * (os.cpu_count() or 1),
            "options": dict(job.request.options),
            "relative_to": [str(file) for file in below],
        }
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", _MODULE,
            stdin=PIPE, stdout=PIPE, stderr=DEVNULL, env=environment(workplace), limit=_LINE_BYTES,
        )  # fmt: skip
        assert process.stdin is not None
        reading = asyncio.create_task(self._read(job, process))
        deadline = time.monotonic() + limits.seconds
        try:
            process.stdin.write(json.dumps(task).encode() + b"\n")
            while not reading.done():
                await asyncio.wait({reading}, timeout=_LOOK_SECONDS)
                if self._book.is_cancelled(job):
                    return None
                if time.monotonic() > deadline:
                    return _error(f"it takes more than {limits.seconds} s (job_hours)", "job_time_exceeded")
            # Not killed before it is waited for: asking whether it lives would take its status from whoever waits.
            status = await asyncio.wait_for(process.wait(), _EXIT_SECONDS)
            return reading.result() or _died(status)
        except TimeoutError:
            return _error("its process did not end", "job_failed")
        finally:
            reading.cancel()
            if process.returncode is None:
                process.kill()
                await process.wait()

    async def _read(self, job: Job, process: Process) -> dict[str, Any] | None:
        assert process.stdout is not None
        async for line in process.stdout:
            said: dict[str, Any] = json.loads(line)
            if "stage" not in said:
                return said
            self._show(job, said["stage"], said["done"], said["total"])
        return None

    def _show(self, job: Job, stage: str, done: int, total: int) -> None:
        self._running = dataclasses.replace(job, progress=Progress(stage, done, total))


def _died(status: int) -> dict[str, Any]:
    if status == -signal.SIGXCPU:
        return _error("it takes more processor time than jobs may have (job_hours)", "job_time_exceeded")
    if status == -signal.SIGKILL:
        return _error("its process was killed, perhaps for want of memory", "job_killed")
    return _error(f"its process ended without a result ({status})", "job_failed")


def _error(message: str, code: str) -> dict[str, Any]:
    return {"error": {"message": message, "param": None, "code": code}}
