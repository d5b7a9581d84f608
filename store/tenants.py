"""What tenants may spend and keep."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from store.access import Caller
from store.backends.ledger import Ledger
from store.documents import Documents
from store.errors import InvalidRequestError
from store.expert_info import NAME_PATTERN
from store.ownership import NO_QUOTA, Quota
from store.strict_json import FieldError, Fields, parse_json

KIND = "tenants"
_MOST = 2**53


@dataclass(frozen=True)
class Limits:
    """Of one tenant, over all its keys and all servers of a Redis; None is no limit.

    Attributes:
        requests_per_minute, tokens_per_minute: rates; as much may come at once.
        max_experts, max_bytes: see `Quota`.
    """

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_experts: int | None = None
    max_bytes: int | None = None


NO_LIMITS = Limits()


class Tenants:
    """The limits of tenants. Thread-safe; sees at once what other servers change.

    Args:
        usual: of tenants with none of their own.
    """

    def __init__(self, ledger: Ledger, usual: Limits = NO_LIMITS) -> None:
        self._documents = Documents(ledger, KIND, lambda _, data: _from_json(data, usual))
        self._usual = usual

    def list(self) -> Mapping[str, Limits]:
        """Those that have limits of their own."""
        return self._documents.all()

    def limits(self, tenant: str | None) -> Limits:
        """What a tenant may; the operator of the server has no limits."""
        return NO_LIMITS if tenant is None else self._documents.all().get(tenant, self._usual)

    def quota(self, by: Caller) -> Quota:
        """What a caller's tenant may keep."""
        limits = self.limits(by.tenant)
        return NO_QUOTA if limits == NO_LIMITS else Quota(limits.max_experts, limits.max_bytes)

    def put(self, tenant: str, limits: Limits) -> None:
        """Give a tenant limits of its own; they count at once.

        Raises:
            InvalidRequestError: that is no tenant's name.
            StoreError: the ledger failed.
        """
        if not NAME_PATTERN.fullmatch(tenant):
            raise InvalidRequestError("a tenant is named as an expert is: a-z, 0-9, '.', '_', '-'", param="tenant")
        self._documents.put(tenant, json.dumps(vars(limits), sort_keys=True).encode() + b"\n")

    def reset(self, tenant: str) -> bool:
        """Let a tenant have the usual limits again; False if it had them."""
        return tenant in self._documents.all() and self._documents.delete(tenant)  # a bad name has none


def _from_json(data: bytes, usual: Limits) -> Limits:
    """Limits as they are kept; damaged ones count as the usual ones."""
    try:
        fields = Fields(parse_json(data, "limits"), "limits")
        names = ("requests_per_minute", "tokens_per_minute", "max_experts", "max_bytes")
        return Limits(**{name: fields.integer(name, low=0, high=_MOST) for name in names if fields.has(name)})
    except FieldError:
        return usual
