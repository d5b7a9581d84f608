"""Who may do what: roles, callers, and whose an expert is."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

MAX_SHARED = 256
"""Most tenants that one expert is shared with."""


class Role(StrEnum):
    """What a key is for."""

    INFER = "infer"
    """Ask: answers, embeddings, routes, and look at experts."""
    UPLOAD = "upload"
    """Publish, replace and remove the tenant's own experts."""
    MONITOR = "monitor"
    """Read the server's figures."""
    ADMIN = "admin"
    """Everything, of all tenants."""


class Visibility(StrEnum):
    """Who may use an expert besides its owner."""

    PRIVATE = "private"
    SHARED = "shared"
    """The tenants it is shared with."""
    PUBLIC = "public"
    """Everyone."""


@dataclass(frozen=True)
class Access:
    """Whose an expert is.

    Attributes:
        owner: a tenant; None is the operator of the server.
        shared_with: tenants, where it is shared.
    """

    owner: str | None = None
    visibility: Visibility = Visibility.PUBLIC
    shared_with: tuple[str, ...] = ()


@dataclass(frozen=True)
class AccessChange:
    """What somebody wants to be so of an expert's access.

    Attributes:
        gives_away: whether `owner` counts; else it stays.
    """

    visibility: Visibility
    shared_with: tuple[str, ...] = ()
    owner: str | None = None
    gives_away: bool = False


@dataclass(frozen=True)
class Caller:
    """Who asks.

    Attributes:
        key: id of the API key, for logs.
        tenant: whom it belongs to; None is the operator of the server.
        roles: what it may do; ADMIN includes the others.
    """

    key: str
    tenant: str | None = None
    roles: frozenset[Role] = field(default_factory=frozenset)

    @property
    def is_admin(self) -> bool:
        return Role.ADMIN in self.roles

    def may(self, role: Role) -> bool:
        """Whether it has the role."""
        return self.is_admin or role in self.roles

    def sees(self, access: Access) -> bool:
        """Whether an expert exists for it."""
        if self.is_admin or access.visibility is Visibility.PUBLIC or self.owns(access):
            return True
        return access.visibility is Visibility.SHARED and self.tenant in access.shared_with

    def owns(self, access: Access) -> bool:
        """Whether it may change an expert."""
        return self.is_admin or (self.tenant is not None and access.owner == self.tenant)


OPERATOR = Caller("operator", None, frozenset(Role))
"""Who runs the server: everything at its start, and everyone where it runs open."""
