"""vLLM's `/v1/load_lora_adapter` and `/v1/unload_lora_adapter`, for whoever comes from there."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter
from fastapi.responses import PlainTextResponse, Response
from pydantic import Field

from server.api.services import Asker, ReadyServices, Services
from server.api.wire import Text, Wire
from server.jobs.inputs import inputs_of
from server.jobs.job import Job, JobRequest, JobState
from store.access import Caller
from store.codecs.base import CodecName
from store.errors import ConflictError, InvalidRequestError, NotFoundError, NotPermittedError

router = APIRouter(prefix="/v1")


_SAID: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {}}, "description": "A sentence, as vLLM's."}}


class LoadBody(Wire):
    """The body of `POST /v1/load_lora_adapter`."""

    lora_name: Text = Field(min_length=1, max_length=64, description="What to call it.")
    lora_path: Text = Field(
        min_length=1, max_length=4096, description="A folder with an adapter, below one of the setting lora_dirs."
    )
    load_inplace: bool = Field(False, description="Replace what the name points to.")


class UnloadBody(Wire):
    """The body of `POST /v1/unload_lora_adapter`."""

    lora_name: Text = Field(min_length=1, max_length=64)
    lora_int_id: int | None = Field(None, description="Accepted and not used.")


@router.post("/load_lora_adapter", response_class=Response, responses=_SAID)
async def load_lora_adapter(body: LoadBody, services: ReadyServices, asker: Asker) -> PlainTextResponse:
    """Make an expert of an adapter on the server's disk, and wait until it is live. vLLM's; see `POST /v1/jobs`."""
    if not services.local_files:
        raise NotPermittedError("no folder of this server may be named: set lora_dirs, or upload the adapter")
    if not body.load_inplace:
        await _check_free(body.lora_name, services, asker)
    files = inputs_of(await asyncio.to_thread(services.local_files.parts, body.lora_path))
    # An adapter's own factors as they are: nothing of it is lost.
    options = {"name": body.lora_name, "description": "", "codec": CodecName.LOW_RANK.value}
    job = await services.jobs.submit(JobRequest(body.lora_name, body.load_inplace, options), asker, files)
    async for seen in services.jobs.watch(job.id, asker):
        job = seen
    _check_done(job)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")


@router.post("/unload_lora_adapter", response_class=Response, responses=_SAID)
async def unload_lora_adapter(body: UnloadBody, services: ReadyServices, asker: Asker) -> PlainTextResponse:
    """Unpublish an expert. vLLM's; see `DELETE /v1/experts/{name}`."""
    await services.library.remove(body.lora_name, asker)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


async def _check_free(name: str, services: Services, by: Caller) -> None:
    """Tell at once what compressing would take minutes to come to."""
    try:
        await services.library.get(name, by)
    except NotFoundError:
        return
    raise ConflictError(f"the name {name} is taken; set load_inplace to replace what it points to", param="lora_name")


def _check_done(job: Job) -> None:
    """Whether a job has published its expert.

    Raises:
        InvalidRequestError: it has not; the message says why.
    """
    if job.state is JobState.SUCCEEDED:
        return
    error = job.error or {}
    message = error.get("message") or f"the job was {job.state}"
    raise InvalidRequestError(message, param="lora_path", code=error.get("code") or "job_failed")
