"""Whose experts are: what callers may find, change and add. What a caller may not see does not exist for it."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from store.access import Access, AccessChange, Caller, Visibility
from store.errors import ConflictError, InvalidRequestError, NotFoundError, NotPermittedError, QuotaExceededError
from store.record import ExpertRecord


@dataclass(frozen=True)
class Quota:
    """What a tenant may keep; None is no limit.

    Attributes:
        max_experts: names, besides at most `MAX_ALIASES` aliases of each.
        max_bytes: of all expert files behind them, earlier versions included, each file once.
    """

    max_experts: int | None = None
    max_bytes: int | None = None


NO_QUOTA = Quota()
MAX_ALIASES = 10
"""Aliases that a tenant may give one of its experts: so `Quota.max_experts` bounds its aliases, too."""
_WIDTH = list(Visibility)
"""Narrow to wide."""


def access_for(by: Caller) -> Access:
    """Whose a new expert is: its tenant's alone, or, of the server's operator, everyone's."""
    return Access() if by.tenant is None else Access(by.tenant, Visibility.PRIVATE)


def check_owned(record: ExpertRecord, by: Caller) -> None:
    """Whether the caller may change an expert.

    Raises:
        NotFoundError: it does not exist for the caller.
        NotPermittedError: it may be used, but not changed.
    """
    if not by.sees(record.access):
        raise NotFoundError(f"there is no expert named {record.name!r}", param="name")
    if not by.owns(record.access):
        raise NotPermittedError(f"the expert {record.name} belongs to others: it can be used, not changed")


def check_name_free(name: str, existing: ExpertRecord | None, by: Caller, *, is_taken: bool, replace: bool) -> None:
    """Whether the caller may publish under a name. Names are global; whose a taken one is, is not told.

    Args:
        existing: what is published under it, unless that is damaged.
        is_taken: whether there is anything at all.

    Raises:
        ConflictError: it is taken by somebody else.
        NotPermittedError: it may be used, but not replaced.
    """
    if existing is None and is_taken and not by.is_admin:  # damaged: whose it was, nobody knows
        raise ConflictError(f"the name {name} is taken; choose another", param="name")
    if existing is not None and not by.sees(existing.access):
        raise ConflictError(f"the name {name} is taken; choose another", param="name")
    if existing is not None and replace:
        check_owned(existing, by)


def changed_access(present: Access, change: AccessChange, by: Caller) -> Access:
    """An expert's access after a change.

    Prompts that are routed find shared and public experts, so that whoever could share at will could have other
    tenants' prompts answered: that takes an administrator.

    Raises:
        InvalidRequestError: the change makes no sense; `param` says where.
        NotPermittedError: it takes an administrator.
    """
    if (change.visibility is Visibility.SHARED) != bool(change.shared_with):
        raise InvalidRequestError(
            "tenants belong to `shared`, which needs some, and to nothing else", param="shared_with"
        )
    wanted = Access(
        change.owner if change.gives_away else present.owner, change.visibility, tuple(sorted({*change.shared_with}))
    )
    if wanted.visibility is Visibility.PRIVATE and wanted.owner is None:
        raise InvalidRequestError("a private expert belongs to a tenant: name its owner", param="owner")
    wider = _WIDTH.index(wanted.visibility) > _WIDTH.index(present.visibility) or (
        present.visibility is Visibility.SHARED and bool({*wanted.shared_with} - {*present.shared_with})
    )
    if not by.is_admin and (wider or wanted.owner != present.owner):
        raise NotPermittedError("to give an expert to others takes an administrator", param="visibility")
    return wanted


def check_quota(records: Iterable[ExpertRecord], new: ExpertRecord, by: Caller, quota: Quota) -> None:
    """Whether a tenant may keep one more expert, or another version of one.

    Args:
        records: all of the store; what `new` replaces is counted as replaced.

    Raises:
        QuotaExceededError: it may not.
    """
    if by.tenant is None or new.access.owner != by.tenant or quota == NO_QUOTA:
        return
    own = [record for record in records if record.access.owner == by.tenant and record.name != new.name]
    if quota.max_experts is not None and len(own) + 1 > quota.max_experts:
        raise QuotaExceededError(f"{by.tenant} may keep {quota.max_experts} experts: remove one first")
    if quota.max_bytes is not None and (total := kept_bytes([*own, new])) > quota.max_bytes:
        raise QuotaExceededError(
            f"{by.tenant} may keep {quota.max_bytes} bytes of experts and their earlier versions, and this would make "
            f"it {total}: remove one first"
        )


def check_alias_quota(target: ExpertRecord, aliases: Collection[str], by: Caller) -> None:
    """Whether a tenant may give an expert one more alias.

    Args:
        aliases: those that it has.

    Raises:
        QuotaExceededError: it may not.
    """
    if by.tenant is not None and target.access.owner == by.tenant and len(aliases) >= MAX_ALIASES:
        raise QuotaExceededError(
            f"{by.tenant} may keep {MAX_ALIASES} aliases of one expert, and {target.name} has {len(aliases)}: "
            "remove one first",
            param="target",
        )


def kept_bytes(records: Iterable[ExpertRecord]) -> int:
    """Bytes of all files of some experts, earlier versions included, each file once."""
    return sum({one.digest: one.bytes for record in records for one in record.versions}.values())
