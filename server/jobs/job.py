"""One job: what was asked for, how far it is, and what came of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from store.access import Caller, Role


class JobState(StrEnum):
    """Where a job is."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        return self not in (JobState.QUEUED, JobState.RUNNING)


@dataclass(frozen=True)
class JobRequest:
    """A fine-tune to be compressed and published.

    Attributes:
        name: what the expert is called; None takes "expert-" and its digest's beginning.
        replace: whatever the name points to.
        options: for `store.convert.compress`: codec, density, exemplars, ...
        stands_on: digests of the expert that the fine-tune started from and of what that one stands on, nearest first;
            none for the base.
    """

    name: str | None
    replace: bool
    options: Mapping[str, Any]
    stands_on: Sequence[str] = ()


@dataclass(frozen=True)
class Progress:
    """How far a running job is: `done` of `total` steps of a stage."""

    stage: str
    done: int
    total: int


@dataclass(frozen=True)
class Job:
    """A job as it is kept.

    Attributes:
        id: what it is called.
        request: what was asked for.
        by: who asked; the expert becomes theirs.
        created, started, finished: seconds since 1970.
        bytes: size of what it works on.
        attempts: how often it was begun.
        progress: of a running one.
        expert: name and digest of what was published.
        report: what compressing cost and kept.
        error: why it failed: message, param, code.
    """

    id: str
    request: JobRequest
    by: Caller
    created: int
    bytes: int
    state: JobState = JobState.QUEUED
    started: int | None = None
    finished: int | None = None
    attempts: int = 0
    progress: Progress | None = None
    expert: Mapping[str, str] | None = None
    report: Mapping[str, Any] | None = field(default=None)
    error: Mapping[str, str | None] | None = None

    def is_seen_by(self, caller: Caller) -> bool:
        """Whether it exists for somebody."""
        return caller.is_admin or (caller.tenant is not None and caller.tenant == self.by.tenant)

    def to_json(self) -> str:
        """For its file; how far it is at the moment is not kept."""
        fields = asdict(self)
        del fields["progress"]
        fields["by"]["roles"] = sorted(self.by.roles)
        return json.dumps(fields)


def next_of(jobs: Sequence[Job]) -> Job | None:
    """Of the tenant whose last job was begun longest ago, the job that has waited longest."""
    begun: dict[str | None, int] = {}
    for job in jobs:
        begun[job.by.tenant] = max(begun.get(job.by.tenant, 0), job.started or 0)
    queued = (job for job in jobs if job.state is JobState.QUEUED)
    return min(queued, key=lambda job: (begun[job.by.tenant], job.created, job.id), default=None)


def parse_job(data: bytes) -> Job | None:
    """What `to_json` wrote; None where that is damaged."""
    try:
        fields = json.loads(data)
        by = fields.pop("by")
        fields["by"] = Caller(by["key"], by["tenant"], frozenset(map(Role, by["roles"])))
        return Job(**{**fields, "request": JobRequest(**fields["request"]), "state": JobState(fields["state"])})
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
