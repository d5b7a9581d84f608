"""`/v1/jobs`: raw fine-tunes, checkpoints and adapters, become experts in the background."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, ClassVar, Literal

from fastapi import APIRouter, Response
from pydantic import BeforeValidator, Field
from typing_extensions import TypedDict

from server.api.compress_options import CompressOptions
from server.api.conditions import GIVEN, NOT_GIVEN, TRUE, Rules, has, lacks, when
from server.api.errors import ErrorDetail
from server.api.services import Asker, ReadyServices, Services
from server.api.streaming import Events, EventStream
from server.api.wire import Text, Wire
from server.api.words import METADATA, Author, Exemplar, License, MetadataValue, Name, Parents, Tags, not_too_many
from server.generation import AUTO
from server.jobs.inputs import inputs_of
from server.jobs.job import Job, JobRequest
from server.jobs.naming import check_name
from store.access import Caller
from store.card import Card, card_to_json, check_card
from store.codecs.base import CodecName
from store.codecs.t_switch import Knob
from store.errors import InvalidRequestError
from store.labelled import MAX_LABELLED
from store.strict_json import FieldError

router = APIRouter(prefix="/v1/jobs")

_MAX_FILES = 256
_NO_DENSITIES = {"anyOf": [NOT_GIVEN, {"type": "object", "maxProperties": 0}]}


class LabelledPrompt(Wire):
    """A prompt with the answer that counts as right."""

    prompt: Text = Field(min_length=1)
    answer: Text = Field(min_length=1)


class FineTuneBody(Wire):
    """Which uploads make up a fine-tune, and what the expert is called and for."""

    uploads: list[Text] = Field(
        fail_fast=True,
        min_length=1,
        max_length=_MAX_FILES,
        description="Ids of complete uploads: a checkpoint's safetensors files, with their index if there are several; "
        "or adapter_config.json and adapter_model.safetensors. They are used up.",
    )
    name: Name | None = Field(None, description='What to call it; default: "expert-" and its digest.')
    replace: bool = Field(False, description="Replace what the name points to.")
    description: Text = Field("", max_length=2000, description="One line for people.")
    author: Author = Field("", description="Who made it.")
    license: License = Field("", description="Its licence, as an SPDX expression.")
    tags: Tags = Field([], description="What it can be found by.")
    parents: Parents = Field([], description="Digests of the experts it was made from.")
    metadata: Annotated[dict[Text, MetadataValue], BeforeValidator(not_too_many)] = Field(
        {}, description="Anything else.", json_schema_extra=METADATA
    )
    relative_to: Text | None = Field(
        None,
        max_length=64,
        description="The expert here that the fine-tune started from, by name or digest: the new one stands on it.",
    )
    exemplars: list[Exemplar] | None = Field(
        None,
        fail_fast=True,
        min_length=1,
        max_length=1024,
        description="Prompts the expert is for; they calibrate it, and route.",
    )
    labelled: list[LabelledPrompt] | None = Field(
        None,
        fail_fast=True,
        min_length=1,
        max_length=MAX_LABELLED,
        description="Prompts with their answers, not stored: they tell how much of the fine-tune's gain is kept.",
    )


class JobBody(CompressOptions, FineTuneBody):
    """The body of `POST /v1/jobs`: which uploads make up the fine-tune, and how it is compressed."""

    between: ClassVar[Rules] = (
        when(has(replace=TRUE), has(name=GIVEN)),
        when(has(min_retention=GIVEN), has(labelled=GIVEN)),
        when(has(knob={"const": Knob.CALIBRATED}), has(exemplars=GIVEN)),
        when(has(max_kl=GIVEN), has(exemplars=GIVEN)),
        when(has(min_agreement=GIVEN), has(exemplars=GIVEN)),
        when(has(bits_per_param=GIVEN), lacks(max_size=NOT_GIVEN)),
        when(
            has(codec={"const": CodecName.FLEX_SWITCH}),
            has(exemplars=GIVEN),
            lacks(bits_per_param=NOT_GIVEN, max_size=NOT_GIVEN),
        ),
        when(has(codec={"const": CodecName.OVERWRITE}), lacks(relative_to=NOT_GIVEN, tensor_density=_NO_DENSITIES)),
        when(
            has(codec={"not": {"const": CodecName.T_SWITCH}}),
            lacks(tensor_density={"additionalProperties": {"const": 0}}),
        ),
    )

    def options(self) -> dict[str, Any]:
        """What `store.convert.compress` is given; the card as JSON has it.

        Raises:
            InvalidRequestError: what is said about the expert breaks a rule of the format, or options do not go
                together.
        """
        self.check(
            exemplars=self.exemplars is not None,
            labelled=self.labelled is not None,
            stands=self.relative_to is not None,
        )
        said = Card(self.author, self.license, tuple(self.tags), tuple(self.parents), self.metadata)
        try:
            check_card(said)
        except FieldError as error:
            raise InvalidRequestError(f"{error.field} {error.message}", param=error.field) from None
        left_out = {"uploads", "replace", "relative_to", *(field.name for field in dataclasses.fields(Card))}
        return self.model_dump(exclude=left_out, exclude_none=True) | {"card": card_to_json(said)}


class JobProgress(TypedDict):
    """How far a running job is."""

    stage: str
    done: int
    total: int


class JobExpert(TypedDict):
    """What was published."""

    id: str
    digest: str


class JobAnswer(TypedDict):
    """A job."""

    id: str
    object: Literal["job"]
    status: Literal["queued", "running", "succeeded", "failed", "cancelled"]
    name: str | None
    bytes: int
    created_at: int
    started_at: int | None
    finished_at: int | None
    progress: JobProgress | None
    expert: JobExpert | None
    report: dict[str, Any] | None
    """What compressing cost and kept: see `switchyard compress`."""
    error: ErrorDetail | None


class JobList(TypedDict):
    """Jobs, the latest first."""

    object: Literal["list"]
    data: list[JobAnswer]


@router.post("", status_code=202)
async def create_job(body: JobBody, response: Response, services: ReadyServices, asker: Asker) -> JobAnswer:
    """Compress uploaded files into an expert and publish it, in the background."""
    options = body.options()
    await _check_name(body, services, asker)
    below = () if body.relative_to is None else await services.library.stack(body.relative_to, asker)
    request = JobRequest(name=body.name, replace=body.replace, options=options, stands_on=below)
    async with services.inbox.gathered(body.uploads, asker) as files:
        job = await services.jobs.submit(request, asker, inputs_of(files))
    response.headers["Location"] = f"{router.prefix}/{job.id}"
    return _answer(job)


@router.get("")
async def list_jobs(services: ReadyServices, asker: Asker) -> JobList:
    """Jobs, the latest first; ended ones are remembered for a while."""
    return {"object": "list", "data": [_answer(job) for job in await services.jobs.list(asker)]}


@router.get("/{job_id}")
async def get_job(job_id: str, services: ReadyServices, asker: Asker) -> JobAnswer:
    """One job, and how far it is."""
    return _answer(await services.jobs.get(job_id, asker))


@router.get(
    "/{job_id}/events",
    response_class=Response,
    responses={200: {"content": {"text/event-stream": {}}, "description": "A `JobAnswer` each time."}},
)
async def watch_job(job_id: str, services: ReadyServices, asker: Asker) -> Response:
    """The job as server-sent events, whenever it has changed, until it has ended."""
    await services.jobs.get(job_id, asker)
    return EventStream(_events(job_id, services, asker), services.closing)


@router.delete("/{job_id}", status_code=202)
async def cancel_job(job_id: str, services: ReadyServices, asker: Asker) -> JobAnswer:
    """End a job that waits or runs; it is `cancelled` a moment later."""
    return _answer(await services.jobs.cancel(job_id, asker))


async def _check_name(body: JobBody, services: Services, by: Caller) -> None:
    """Before the uploads are used up, and compressed for hours."""
    if body.name is not None:
        reserved = frozenset({AUTO, services.engine.base.name})
        await check_name(services.library, body.name, by, replace=body.replace, reserved=reserved)
    elif body.replace:
        raise InvalidRequestError("say which expert is to be replaced", param="name")


async def _events(job_id: str, services: Services, asker: Caller) -> Events:
    async for job in services.jobs.watch(job_id, asker):
        yield dict(_answer(job))


def _answer(job: Job) -> JobAnswer:
    progress, error = job.progress, job.error
    return {
        "id": job.id,
        "object": "job",
        "status": job.state.value,
        "name": job.request.name,
        "bytes": job.bytes,
        "created_at": job.created,
        "started_at": job.started,
        "finished_at": job.finished,
        "progress": None
        if progress is None
        else {"stage": progress.stage, "done": progress.done, "total": progress.total},
        "expert": None if job.expert is None else {"id": job.expert["id"], "digest": job.expert["digest"]},
        "report": None if job.report is None else dict(job.report),
        "error": None
        if error is None
        else {
            "message": error["message"] or "",
            "type": "job_error",
            "param": error["param"],
            "code": error["code"],
        },
    }
