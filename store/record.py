"""What a store knows of one expert, as a value and as the JSON it keeps under the expert's name."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from store.access import MAX_SHARED, Access, Visibility
from store.card import Card, card_from_json, card_to_json
from store.errors import ConflictError, InvalidRequestError
from store.expert_header import ExpertHeader
from store.expert_info import DIGEST_PATTERN, MAX_DESCRIPTION_BYTES, NAME_PATTERN
from store.measured import Measured, measured_from_json, measured_to_json
from store.patterns import Half
from store.strict_json import FieldError, Fields, parse_json

KEPT_VERSIONS = 8
"""Earlier versions that a name can go back to; what runs on one of them can finish."""


@dataclass(frozen=True)
class ExpertRecord:
    """A published expert.

    Attributes:
        name: what requests call it.
        digest: hex sha256 of its file; what caches and mixes call it.
        bytes: size of its file.
        created: when it was published, seconds since 1970.
        base_fingerprint: the base it was made for.
        codec, density, bits_per_param: from its header.
        description: from its header, and edited since.
        exemplar_count: how many exemplars routing may learn from.
        card: author, licence, tags and the like: from its header, and edited since.
        signature: of its file (`store.signature`), as it came; whose it is, and whether it counts, `store.trust` says.
        exemplars_digest: blob of the exemplars uploaded beside the file, or None where those of its header count.
        relative_to: digest of the expert that it is added on top of; None for the base.
        exact: whether it is its fine-tune bit by bit, alone and at weight 1, in a type that holds it.
        half: the 16-bit type of the weights that it overwrites; None where there is none, or the record is from before
            that was kept.
        measured: from its header: how close it comes to its fine-tune; None where that says nothing.
        access: whose it is: of the name, whatever version it points to.
        earlier: what the name pointed to before, the latest first; at most `KEPT_VERSIONS`, whose bytes are kept.
    """

    name: str
    digest: str
    bytes: int
    created: int
    base_fingerprint: str
    codec: str
    density: float
    bits_per_param: float
    description: str
    exemplar_count: int
    exemplars_digest: str | None
    card: Card = field(default_factory=Card)
    signature: str | None = None
    relative_to: str | None = None
    exact: bool = False
    half: Half | None = None
    measured: Measured | None = None
    access: Access = field(default_factory=Access)
    earlier: tuple[ExpertRecord, ...] = ()

    @property
    def blobs(self) -> set[str]:
        """Digests of all blobs that belong to this record, those of its earlier versions included."""
        own = {self.digest} | ({self.exemplars_digest} if self.exemplars_digest else set())
        return own.union(*(version.blobs for version in self.earlier))

    def matches(self, text: str, tags: Collection[str]) -> bool:
        """Whether it has all these tags, and this text, casefolded, in what is said about it."""
        if not all(tag in self.card.tags for tag in tags):
            return False
        card = self.card
        said = (self.description, card.author, card.license, *card.tags, *card.metadata.values())
        return text in self.name or any(text in part.casefold() for part in said)

    def differs(self, other: ExpertRecord, *, exemplars_given: bool) -> bool:
        """Whether the other one's file is not this one's, or its exemplars where it came with any."""
        return self.digest != other.digest or (exemplars_given and self.exemplars_digest != other.exemplars_digest)

    def signed(self, signature: str | None) -> ExpertRecord:
        """The same, with a signature that came later."""
        return dataclasses.replace(self, signature=signature)

    @property
    def versions(self) -> tuple[ExpertRecord, ...]:
        """This version and the earlier ones, each by itself and once, whenever it was published: where it was last."""
        once: list[ExpertRecord] = []
        for version in (dataclasses.replace(self, access=Access(), earlier=()), *self.earlier):
            if not any(dataclasses.replace(version, created=other.created) == other for other in once):
                once.append(version)
        return tuple(once)

    def pointing_to(self, version: ExpertRecord, earlier: tuple[ExpertRecord, ...]) -> ExpertRecord:
        """The name with another version of it: whose it is stays as it is."""
        return dataclasses.replace(version, access=self.access, earlier=earlier)

    def described(
        self, description: str | None, tags: Sequence[str] | None, metadata: Mapping[str, str | None] | None
    ) -> ExpertRecord:
        """With other words about its present version.

        Args:
            description, tags: in place of the present ones; None leaves them.
            metadata: entries to set, and with None to take away; others stay.
        """
        card = self.card
        merged = {**card.metadata, **(metadata or {})}
        return dataclasses.replace(
            self,
            description=self.description if description is None else description,
            card=dataclasses.replace(
                card,
                tags=card.tags if tags is None else tuple(tags),
                metadata={key: value for key, value in merged.items() if value is not None},
            ),
        )


def record_of(
    header: ExpertHeader,
    *,
    name: str,
    digest: str,
    bytes: int,
    exemplar_count: int,
    exemplars_digest: str | None,
    signature: str | None,
    access: Access,
) -> ExpertRecord:
    """The record of a file that is published now."""
    return ExpertRecord(
        name=name,
        digest=digest,
        bytes=bytes,
        created=int(time.time()),
        base_fingerprint=header.base_fingerprint,
        codec=header.codec,
        density=header.density,
        bits_per_param=header.bits_per_param,
        description=header.description,
        exemplar_count=exemplar_count,
        exemplars_digest=exemplars_digest,
        card=header.card,
        signature=signature,
        relative_to=header.relative_to,
        exact=header.is_exact,
        half=header.half,
        measured=header.measured,
        access=access,
    )


def check_same(existing: ExpertRecord, record: ExpertRecord, *, exemplars_given: bool) -> None:
    """Refuse a record whose name belongs to another expert.

    Raises:
        ConflictError: it does; or to the same one with other exemplars, where the record came with any.
    """
    if existing.digest != record.digest:
        other = "" if existing.base_fingerprint == record.base_fingerprint else " of another base"
        raise ConflictError(
            f"the name {record.name} belongs to another expert{other} ({existing.digest[:12]}…); replace it "
            "(PUT, or push --replace), or choose another name",
            param="name",
        )
    if existing.differs(record, exemplars_given=exemplars_given):
        raise ConflictError(
            f"the expert {record.name} is published with other exemplars; replace it (PUT, or push --replace)",
            param="exemplars",
        )


def check_record(record: ExpertRecord) -> None:
    """Whether a store can keep the record.

    Raises:
        InvalidRequestError: it breaks a rule of the format; `param` says which part.
    """
    try:
        record_from_json(record.name, Fields(parse_json(record_to_json(record), "record"), "record"))
    except FieldError as error:
        raise InvalidRequestError(f"{error.field} {error.message}", param=error.field) from None


def record_to_json(record: ExpertRecord) -> bytes:
    """What a store keeps: equal records give equal bytes."""
    fields = _version_to_json(record) | _access_to_json(record.access)
    fields["earlier"] = [_version_to_json(version) for version in record.earlier]
    return json.dumps(fields, indent=1, sort_keys=True).encode("ascii") + b"\n"


def _version_to_json(version: ExpertRecord) -> dict[str, object]:
    apart = ("access", "card", "signature", "relative_to", "exact", "half", "measured", "earlier")
    plain = (item.name for item in dataclasses.fields(version) if item.name not in apart)
    # Left out where they say nothing: records from before they were known stay as they are, byte for byte.
    report = None if version.measured is None else measured_to_json(version.measured)
    extra = {
        "signature": version.signature,
        "relative_to": version.relative_to,
        "exact": version.exact or None,
        "half": version.half,
        "report": report,
    }
    said = {name: value for name, value in extra.items() if value is not None}
    return {name: getattr(version, name) for name in plain} | card_to_json(version.card) | said


def _access_to_json(access: Access) -> dict[str, object]:
    """Nothing where it is the default: records from before tenants stay as they are, byte for byte."""
    if access == Access():
        return {}
    return {"owner": access.owner, "visibility": access.visibility, "shared_with": sorted(access.shared_with)}


def _access(fields: Fields) -> Access:
    if not fields.has("visibility"):
        return Access()
    try:
        visibility = Visibility(fields.text("visibility", max_bytes=16))
    except ValueError:
        fields.fail("visibility", "is none")
    shared = fields.strings("shared_with", max_items=MAX_SHARED, max_bytes=64)
    if not all(NAME_PATTERN.fullmatch(tenant) for tenant in shared):
        fields.fail("shared_with", "holds what is no tenant's name")
    owner = fields.text("owner", max_bytes=64, pattern=NAME_PATTERN) if fields.has("owner") else None
    return Access(owner, visibility, shared)


def record_from_json(name: str, fields: Fields) -> ExpertRecord:
    """Read what a store keeps under a name.

    Raises:
        FieldError: it is damaged.
    """
    earlier = fields.items("earlier", max_items=KEPT_VERSIONS) if fields.has("earlier") else []
    versions = (_version(name, Fields(item, "earlier", prefix="earlier.")) for item in earlier)
    return dataclasses.replace(_version(name, fields), access=_access(fields), earlier=tuple(versions))


def _version(name: str, fields: Fields) -> ExpertRecord:
    digest = DIGEST_PATTERN
    if fields.text("name", max_bytes=64) != name:
        fields.fail("name", "is not the record's own")
    return ExpertRecord(
        name=name,
        digest=fields.text("digest", max_bytes=64, pattern=digest),
        bytes=fields.integer("bytes", low=0, high=2**53),
        created=fields.integer("created", low=0, high=2**53),
        base_fingerprint=fields.text("base_fingerprint", max_bytes=64, pattern=digest),
        codec=fields.text("codec", max_bytes=32),
        density=fields.number("density", low=0.0, high=1.0),
        bits_per_param=fields.number("bits_per_param", low=0.0, high=1024.0),
        description=fields.text("description", max_bytes=MAX_DESCRIPTION_BYTES),
        exemplar_count=fields.integer("exemplar_count", low=0, high=2**31),
        exemplars_digest=fields.text("exemplars_digest", max_bytes=64, pattern=digest)
        if fields.has("exemplars_digest")
        else None,
        card=card_from_json(fields),
        signature=fields.text("signature", max_bytes=200) if fields.has("signature") else None,
        relative_to=fields.text("relative_to", max_bytes=64, pattern=digest) if fields.has("relative_to") else None,
        exact=fields.has("exact") and fields.get("exact") is True,
        half=next((half for half in Half if fields.has("half") and fields.get("half") == half), None),
        measured=measured_from_json(fields.child("report")) if fields.has("report") else None,
    )
