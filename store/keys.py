"""API keys: random words of which only a digest is kept.

A key is `sy_ID_SECRET`. The id finds it and may stand in logs; the secret has 256 random bits, so that a plain SHA-256
is enough to keep: there is nothing to guess that salt or a slow hash would protect, and every request pays for the
hash.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import secrets
import time
from dataclasses import dataclass, replace

from store.access import Caller, Role
from store.backends.ledger import Ledger
from store.documents import Documents
from store.errors import InvalidRequestError, NotFoundError, StoreError
from store.expert_info import DIGEST_PATTERN, NAME_PATTERN
from store.strict_json import FieldError, Fields, parse_json

KIND = "keys"
MAX_LABEL_BYTES = 200
_TOKEN = re.compile(r"sy_([a-z0-9]{12})_([A-Za-z0-9_-]{43})")
_NOBODYS = "0" * 64
_LATEST = 2**53
LATEST_EXPIRY = 253_402_300_799
"""The last second of the year 9999: what is later has no date."""


@dataclass(frozen=True)
class ApiKey:
    """What is kept of a key.

    Attributes:
        id: finds it; no secret.
        digest: hex sha256 of the whole key.
        tenant: whom it belongs to; None is the operator.
        created, expires, revoked: seconds since 1970; None for never.
        requests_per_minute, tokens_per_minute: its own limits, besides its tenant's; None for none.
    """

    id: str
    digest: str
    tenant: str | None
    roles: frozenset[Role]
    label: str
    created: int
    created_by: str
    expires: int | None = None
    revoked: int | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None

    def is_live(self, now: float) -> bool:
        """Whether it opens anything."""
        return self.revoked is None and (self.expires is None or now < self.expires)

    @property
    def caller(self) -> Caller:
        """Who asks with it."""
        return Caller(self.id, self.tenant, self.roles)


class Keys:
    """The keys of a store. Thread-safe; sees at once what other servers and the command line change."""

    def __init__(self, ledger: Ledger) -> None:
        self._documents = Documents(ledger, KIND, _from_json)

    def __bool__(self) -> bool:
        """Whether there ever was one: a server whose last key is revoked must not open itself."""
        return bool(self._documents.all())

    def get(self, key_id: str) -> ApiKey | None:
        """The key of that id, if there is one."""
        return self._documents.all().get(key_id)

    def list(self) -> list[ApiKey]:
        """All keys, the oldest first, with those that were revoked."""
        return sorted(self._documents.all().values(), key=lambda key: (key.created, key.id))

    def create(
        self,
        *,
        tenant: str | None,
        roles: frozenset[Role],
        label: str = "",
        expires: int | None = None,
        requests_per_minute: int | None = None,
        tokens_per_minute: int | None = None,
        by: str,
    ) -> tuple[ApiKey, str]:
        """Make a key. The key itself is returned here and nowhere else.

        Args:
            tenant: None is the operator of the server, whose keys are for administration or monitoring.
            expires: seconds since 1970, at most `LATEST_EXPIRY`.
            by: who makes it, for the list.

        Raises:
            InvalidRequestError: a value is out of range; `param` says which.
            StoreError: the ledger failed.
        """
        if tenant is not None and not NAME_PATTERN.fullmatch(tenant):
            raise InvalidRequestError("a tenant is named as an expert is: a-z, 0-9, '.', '_', '-'", param="tenant")
        if not roles:
            raise InvalidRequestError("a key needs a role: infer, upload, monitor or admin", param="roles")
        if tenant is None and not roles <= {Role.ADMIN, Role.MONITOR}:
            raise InvalidRequestError("a key that may ask or upload belongs to a tenant", param="tenant")
        if len(label.encode()) > MAX_LABEL_BYTES:
            raise InvalidRequestError(f"a label has at most {MAX_LABEL_BYTES} bytes", param="label")
        now = int(time.time())
        if expires is not None and expires <= now:
            raise InvalidRequestError("the key would have expired already", param="expires")
        if expires is not None and expires > LATEST_EXPIRY:
            raise InvalidRequestError(
                "a key expires in the year 9999 at the latest: leave it out for one that never does", param="expires"
            )
        # Hexadecimal digits: what is read aloud, typed and matched by scanners for secrets.
        token = f"sy_{(key_id := secrets.token_hex(6))}_{secrets.token_urlsafe(32)}"
        key = ApiKey(
            key_id, _digest(token), tenant, roles, label, now, by, expires,
            requests_per_minute=requests_per_minute, tokens_per_minute=tokens_per_minute,
        )  # fmt: skip
        if not self._documents.put(key_id, _to_json(key), absent=True):
            raise StoreError("there is a key of that id already; try again")
        return key, token

    def revoke(self, key_id: str) -> ApiKey:
        """Let a key open nothing any more, from now on and on all servers. Once more changes nothing.

        Raises:
            NotFoundError: there is none of that id.
        """
        key = self._documents.all().get(key_id)
        if key is None:
            raise NotFoundError(f"there is no key {key_id[:64]!r}", param="id", code="key_not_found")
        if key.revoked is None:
            key = replace(key, revoked=int(time.time()))
            self._documents.put(key_id, _to_json(key))
        return key

    def find(self, token: str) -> ApiKey | None:
        """The live key, or None. Takes the same time whether id, secret or both are wrong."""
        match = _TOKEN.fullmatch(token)
        key = self._documents.all().get(match[1]) if match else None
        same = hmac.compare_digest(_digest(token), _NOBODYS if key is None else key.digest)
        return key if key is not None and same and key.is_live(time.time()) else None


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest()


def _to_json(key: ApiKey) -> bytes:
    fields = {name: value for name, value in vars(key).items() if value is not None}
    return json.dumps(fields | {"roles": sorted(key.roles)}, indent=1, sort_keys=True).encode() + b"\n"


def _from_json(name: str, data: bytes) -> ApiKey:
    """A key as it is kept. One that is damaged opens nothing, and shows in the list."""
    try:
        fields = Fields(parse_json(data, "key"), "key")

        def number(key: str) -> int | None:
            return fields.integer(key, low=0, high=_LATEST) if fields.has(key) else None

        return ApiKey(
            id=name,
            digest=fields.text("digest", max_bytes=64, pattern=DIGEST_PATTERN),
            tenant=fields.text("tenant", max_bytes=64, pattern=NAME_PATTERN) if fields.has("tenant") else None,
            roles=frozenset(Role(role) for role in fields.strings("roles", max_items=len(Role), max_bytes=16)),
            label=fields.text("label", max_bytes=MAX_LABEL_BYTES),
            created=fields.integer("created", low=0, high=_LATEST),
            created_by=fields.text("created_by", max_bytes=200),
            expires=number("expires"),
            revoked=number("revoked"),
            requests_per_minute=number("requests_per_minute"),
            tokens_per_minute=number("tokens_per_minute"),
        )
    except (FieldError, ValueError):
        return ApiKey(name, _NOBODYS, None, frozenset(), "(damaged)", 0, "", revoked=0)
