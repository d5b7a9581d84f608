"""What a store knows of one expert, as a value and as the JSON it keeps under the expert's name."""

from __future__ import annotations

import dataclasses
import json
import logging
from dataclasses import asdict, dataclass

from store.expert_header import DIGEST_PATTERN, MAX_DESCRIPTION_BYTES
from store.strict_json import FieldError, Fields, parse_json

_log = logging.getLogger(__name__)

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
        codec, density, bits_per_param, description: from its header.
        exemplar_count: how many exemplars routing may learn from.
        exemplars_digest: blob of the exemplars uploaded beside the file, or None where those of its header count.
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
    earlier: tuple[ExpertRecord, ...] = ()

    @property
    def blobs(self) -> set[str]:
        """Digests of all blobs that belong to this record, those of its earlier versions included."""
        own = {self.digest} | ({self.exemplars_digest} if self.exemplars_digest else set())
        return own.union(*(version.blobs for version in self.earlier))

    @property
    def versions(self) -> tuple[ExpertRecord, ...]:
        """This version and the earlier ones, each by itself."""
        return (dataclasses.replace(self, earlier=()), *self.earlier)


def parse_record(name: str, data: bytes | None) -> ExpertRecord | None:
    """A record as a value; None, and a line in the log, if it is damaged, None too if there is none."""
    try:
        return None if data is None else _from_json(name, data)
    except FieldError as error:
        _log.warning("the record of %s is damaged and ignored: %s %s", name, error.field, error.message)
        return None


def record_to_json(record: ExpertRecord) -> bytes:
    """What a store keeps: equal records give equal bytes."""
    fields = asdict(record)
    for version in fields["earlier"]:
        del version["earlier"]
    return json.dumps(fields, indent=1, sort_keys=True).encode("ascii") + b"\n"


def _from_json(name: str, data: bytes) -> ExpertRecord:
    fields = Fields(parse_json(data, "record"), "record")
    earlier = fields.items("earlier", max_items=KEPT_VERSIONS) if fields.has("earlier") else []
    versions = (_version(name, Fields(item, "earlier", prefix="earlier.")) for item in earlier)
    return dataclasses.replace(_version(name, fields), earlier=tuple(versions))


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
    )
