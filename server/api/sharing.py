"""`/v1/experts/{name}/access`: who may use an expert."""

from __future__ import annotations

from typing import Annotated, ClassVar

from fastapi import APIRouter
from pydantic import Field

from server.api.conditions import NOT_SOME, SOME, Rules, has, lacks, when
from server.api.expert_answers import Expert, expert_answer
from server.api.services import Asker, ReadyServices, Trail
from server.api.wire import Wire
from server.api.words import Name
from store.access import MAX_SHARED, AccessChange, Visibility

router = APIRouter(prefix="/v1/experts")


class AccessBody(Wire):
    """The body of `PUT /v1/experts/{name}/access`."""

    visibility: Annotated[Visibility, Field(strict=False)] = Field(
        description="private: its tenant's; shared: and that of the tenants named; public: everyone's."
    )
    shared_with: list[Name] = Field([], max_length=MAX_SHARED, description="Tenants; for `shared` alone.")
    owner: Name | None = Field(None, description="Another tenant, or null: the operator. Left out: as it was.")

    between: ClassVar[Rules] = (
        when(has(visibility={"const": "shared"}), has(shared_with=SOME), lacks(shared_with=NOT_SOME)),
    )


@router.put("/{name}/access")
async def set_access(name: Name, body: AccessBody, services: ReadyServices, asker: Asker, trail: Trail) -> Expert:
    """Say who may use an expert. Its owner may make it private; to let others have it takes an administrator."""
    trail |= {"visibility": body.visibility.value, "shared_with": " ".join(body.shared_with)[:500]}
    change = AccessChange(body.visibility, tuple(body.shared_with), body.owner, "owner" in body.model_fields_set)
    return expert_answer(await services.library.set_access(name, change, asker), services, asker)
