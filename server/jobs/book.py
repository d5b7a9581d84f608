"""The jobs on disk: every change is whole or absent, whenever the server dies.

jobs/ID/job.json    the job; a folder without one belongs to no job
jobs/ID/input/      the files it works on, until it has ended
jobs/ID/made/       what it makes; emptied before each attempt
jobs/ID/cancel      there once somebody wants it to end
jobs/lock           held by the server that runs jobs
jobs/adding         held by whichever server adds one
"""

from __future__ import annotations

import dataclasses
import fcntl
import os
import re
import secrets
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from server.jobs.job import Job, JobRequest, JobState, parse_job
from store.access import Caller
from store.errors import NotFoundError, QueueFullError
from store.intake import receiving

_ID_PATTERN = re.compile(r"job_[0-9a-f]{32}")
_RETRY_SECONDS = 60
_KEPT = 100
"""Ended jobs that are remembered."""
_ATTEMPTS = 2


class JobBook:
    """Jobs in a folder, which is made when it is needed. Thread-safe.

    Args:
        max_queued: how many may wait or run. A tenant that fills this must not shut out others: the first job of one
            that has none is let in beyond.
    """

    def __init__(self, folder: Path, max_queued: int) -> None:
        self._folder = folder
        self._max_queued = max_queued
        self._lock: IO[bytes] | None = None

    def may_run(self) -> bool:
        """Whether this server is the one that runs jobs; it stays so."""
        if self._lock is None:
            with receiving():
                self._folder.mkdir(parents=True, exist_ok=True)
                lock = (self._folder / "lock").open("ab")
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                lock.close()
                return False
            self._lock = lock
        return True

    def close(self) -> None:
        """Let another server run jobs."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def recover(self) -> None:
        """Take up what a dead server has left: its jobs wait again, or have failed; the rest is removed."""
        for job in self.list():
            if job.state is JobState.RUNNING and job.attempts < _ATTEMPTS:
                self.save(dataclasses.replace(job, state=JobState.QUEUED))
            elif job.state is JobState.RUNNING:
                self.fail(job, "the server was stopped while it worked on this, twice", "interrupted")
            elif job.state.is_final:
                self._clear(job)
        known = {job.id for job in self.list()}
        for path in self._folder.glob("job_*"):
            if path.name not in known and time.time() - path.stat().st_mtime > _RETRY_SECONDS:
                shutil.rmtree(path, ignore_errors=True)

    def create(self, request: JobRequest, by: Caller, files: Mapping[str, Callable[[Path], int]]) -> Job:
        """A new job.

        Args:
            files: name → puts a file there and tells its bytes.

        Raises:
            QueueFullError: too many wait.
            SwitchyardError: a file cannot be had; nothing is left.
        """
        with self._adding():
            self._check_room(by)
            folder = self._folder / f"job_{secrets.token_hex(16)}"
            try:
                with receiving():
                    (folder / "input").mkdir(parents=True)
                size = sum(put(folder / "input" / name) for name, put in files.items())
                job = Job(folder.name, request, by, int(time.time()), size)
                self.save(job)
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
        return job

    @contextmanager
    def _adding(self) -> Iterator[None]:
        """One job is added at a time, by all servers of the folder: whoever counts them must see the one before."""
        with receiving():
            self._folder.mkdir(parents=True, exist_ok=True)
            lock = (self._folder / "adding").open("ab")
        with lock:
            with receiving():
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _check_room(self, by: Caller) -> None:
        waiting = [job.by.tenant for job in self.list() if not job.state.is_final]
        if len(waiting) >= self._max_queued and by.tenant in waiting:
            raise QueueFullError(f"{len(waiting)} jobs wait or run, and no more may", retry_after=_RETRY_SECONDS)

    def get(self, job_id: str) -> Job:
        """The job of that id.

        Raises:
            NotFoundError: there is none (any more).
        """
        if _ID_PATTERN.fullmatch(job_id):
            with suppress(OSError):
                job = parse_job((self._folder / job_id / "job.json").read_bytes())
                if job is not None:
                    return job
        raise NotFoundError(f"there is no job {job_id[:64]!r}", param="job", code="job_not_found")

    def list(self) -> Sequence[Job]:
        """All jobs, the oldest first."""
        found = []
        for path in self._folder.glob("job_*"):
            with suppress(NotFoundError):
                found.append(self.get(path.name))
        return sorted(found, key=lambda job: (job.created, job.id))

    def input_bytes(self) -> Mapping[str | None, int]:
        """What the files of waiting and running jobs take, by tenant."""
        taken: Counter[str | None] = Counter()
        for job in self.list():
            if not job.state.is_final:
                taken[job.by.tenant] += job.bytes
        return taken

    def save(self, job: Job) -> None:
        """Write a job down, durably. One that has ended loses its files.

        Raises:
            StoreError: it cannot be written.
        """
        folder = self._folder / job.id
        with receiving():
            with (folder / "job.tmp").open("wb") as file:
                file.write(job.to_json().encode())
                file.flush()
                os.fsync(file.fileno())
            (folder / "job.tmp").replace(folder / "job.json")
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        if job.state.is_final:
            self._clear(job)
            ended = [other for other in self.list() if other.state.is_final]
            for other in ended[: max(0, len(ended) - _KEPT)]:
                shutil.rmtree(self._folder / other.id, ignore_errors=True)

    def fail(self, job: Job, message: str, code: str, param: str | None = None) -> Job:
        """Write down why a job has failed."""
        error = {"message": message, "param": param, "code": code}
        failed = dataclasses.replace(job, state=JobState.FAILED, finished=int(time.time()), error=error, progress=None)
        self.save(failed)
        return failed

    def cancel(self, job: Job) -> None:
        """Ask for a job's end."""
        with receiving():
            (self._folder / job.id / "cancel").touch()

    def is_cancelled(self, job: Job) -> bool:
        """Whether somebody has asked for its end."""
        return (self._folder / job.id / "cancel").exists()

    def input_of(self, job: Job) -> Path:
        """The folder of the files that it works on."""
        return self._folder / job.id / "input"

    def workplace(self, job: Job) -> Path:
        """An empty folder for what it makes."""
        folder = self._folder / job.id / "made"
        with receiving():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        return folder

    def _clear(self, job: Job) -> None:
        for name in ("input", "made", "cancel"):
            path = self._folder / job.id / name
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
