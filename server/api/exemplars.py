"""`/v1/experts/{name}/exemplars`: by which prompts an expert is found."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter
from pydantic import Field
from typing_extensions import TypedDict

from server.api.expert_answers import Expert, expert_answer
from server.api.services import AnyServices, Asker, ReadyServices, Trail
from server.api.wire import Wire
from server.api.words import Exemplar, Name
from store.exemplars import MAX_LINES

router = APIRouter(prefix="/v1/experts")


class Exemplars(Wire):
    """Prompts that tell what an expert is for."""

    exemplars: Annotated[list[Exemplar], Field(min_length=1, max_length=MAX_LINES, fail_fast=True)]


class ExemplarList(TypedDict):
    """By which prompts an expert is found."""

    id: str
    object: Literal["expert.exemplars"]
    from_file: bool
    """Whether they are those in the header of its file."""
    exemplars: list[str]


@router.get("/{name}/exemplars")
async def get_exemplars(name: Name, services: AnyServices, asker: Asker) -> ExemplarList:
    """The prompts that an expert is found by, for its owner: others may use it, and see what is near their prompts."""
    record, exemplars = await services.library.exemplars(name, asker)
    return {
        "id": record.name,
        "object": "expert.exemplars",
        "from_file": record.exemplars_digest is None,
        "exemplars": list(exemplars),
    }


@router.put("/{name}/exemplars")
async def put_exemplars(name: Name, body: Exemplars, services: ReadyServices, asker: Asker, trail: Trail) -> Expert:
    """Let an expert be found by these prompts, in place of all it has. Its file and its digest stay as they are."""
    record = await services.library.set_exemplars(name, lambda _: body.exemplars, asker)
    trail |= {"count": str(record.exemplar_count), "exemplars": record.exemplars_digest or "of the file"}
    return expert_answer(record, services, asker)


@router.delete("/{name}/exemplars")
async def reset_exemplars(name: Name, services: ReadyServices, asker: Asker) -> Expert:
    """Let an expert be found by the prompts in the header of its file again, or by its name only if there are none."""
    return expert_answer(await services.library.set_exemplars(name, lambda _: None, asker), services, asker)
