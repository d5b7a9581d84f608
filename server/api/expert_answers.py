"""What `/v1/experts` answers with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, cast

from typing_extensions import TypedDict

from server.api.services import Services
from server.teaching import Routing
from store.access import Caller
from store.expert_header import ExpertHeader, SparseEntry
from store.layers import Spent
from store.measured import figures
from store.record import ExpertRecord
from store.tiers import Tier


class SignedBy(TypedDict):
    """Whose signature an expert file has: a name where this server trusts the key."""

    name: str | None
    fingerprint: str


class Measured(TypedDict, total=False):
    """How close an expert comes to its fine-tune, as its file has it; what was not measured is not there."""

    relative_error: float
    kl: float
    """Nats per token of the fine-tune's greedy answers."""
    agreement: float
    """Share of these answers that are the expert's too."""
    prompts: int
    held_out: bool
    """Whether the expert was made without these prompts."""
    score: float
    base_score: float
    fine_tune_score: float
    labelled: int
    retention: float
    """Share of the fine-tune's gain over the base that is kept, on labelled exemplars."""


class LayerSpent(TypedDict):
    """What a layer takes in an expert's file; `outside` is what belongs to none."""

    layer: str
    parameters: int
    nonzeros: int
    bytes: int
    density: float
    bits_per_param: float
    bit_width: float
    """Mean bits of a stored value, without its position: 1 is a sign."""


class Expert(TypedDict):
    """An expert."""

    id: str
    object: Literal["expert"]
    created: int
    parent: str
    digest: str
    bytes: int
    base_fingerprint: str
    codec: str
    density: float
    bits_per_param: float
    description: str
    author: str
    license: str
    tags: list[str]
    parents: list[str]
    """Digests of the expert files it was made from."""
    relative_to: str | None
    """Digest of the expert that it stands on, which answers with it; null is the base itself."""
    exact: bool
    """Whether, alone and at weight 1, it is its fine-tune bit by bit."""
    metadata: dict[str, str]
    report: Measured | None
    """Null where its maker measured nothing."""
    signed_by: SignedBy | None
    aliases: list[str]
    """Other names that point to this one."""
    exemplar_count: int
    visibility: Literal["private", "shared", "public"]
    owner: str | None
    """A tenant; null is the server's operator, or somebody else."""
    shared_with: list[str]
    routing: Literal["none", "pending", "ready"]
    """Whether prompts are routed to it; without exemplars it is reached by name only."""
    tier: Literal["device", "host", "store"]
    """Where this server has it nearest to the model."""
    last_used: int | None
    """When this server last answered with it, in Unix seconds; null: not since its start."""


class Tensors(TypedDict):
    """What an expert file holds, in numbers."""

    ternary: int
    dense: int
    elements: int
    nonzeros: int


class ExpertDetails(Expert):
    """An expert, and what its file says about how it was made."""

    routed: bool
    """Whether prompts are routed to it now."""
    routing_reason: str
    """Why they are, or are not, and what to do about it."""
    codec_params: dict[str, Any]
    tool: str
    tensors: Tensors
    layers: list[LayerSpent]


class ExpertList(TypedDict):
    """Experts by name. With `has_more`, the last one's `id` is the `after` of the next page."""

    object: Literal["list"]
    data: list[Expert]
    has_more: bool


class Version(TypedDict):
    """What a name points to, or has pointed to."""

    digest: str
    object: Literal["expert.version"]
    created: int
    bytes: int
    codec: str
    bits_per_param: float
    description: str
    exemplar_count: int
    current: bool


class VersionList(TypedDict):
    """The versions of one expert: the present one, then the earlier ones, the latest first."""

    object: Literal["list"]
    data: list[Version]


class Deleted(TypedDict):
    """What is left of an expert."""

    id: str
    object: Literal["expert"]
    deleted: Literal[True]


def expert_answer(record: ExpertRecord, services: Services, by: Caller) -> Expert:
    """An expert as lists show it. Whose it is and who else has it is told to its owner."""
    is_own = by.owns(record.access)
    return {
        "id": record.name,
        "object": "expert",
        "created": record.created,
        "parent": services.engine.base.name,
        "digest": record.digest,
        "bytes": record.bytes,
        "base_fingerprint": record.base_fingerprint,
        "codec": record.codec,
        "density": record.density,
        "bits_per_param": record.bits_per_param,
        "description": record.description,
        "author": record.card.author,
        "license": record.card.license,
        "tags": list(record.card.tags),
        "parents": list(record.card.parents),
        "relative_to": record.relative_to,
        "exact": record.exact,
        "metadata": dict(record.card.metadata),
        "report": None if record.measured is None else cast(Measured, figures(record.measured)),
        "signed_by": _signer(record, services),
        "aliases": list(services.library.aliases_of(record.name)),
        "exemplar_count": record.exemplar_count,
        "visibility": record.access.visibility.value,
        "owner": record.access.owner if is_own else None,
        "shared_with": list(record.access.shared_with) if is_own else [],
        "routing": services.library.routing(record).value,
        "tier": _tier(record.digest, services),
        "last_used": services.recency.last(record.digest),
    }


def version_answer(version: ExpertRecord, current: bool) -> Version:
    """One version of an expert."""
    return {
        "digest": version.digest,
        "object": "expert.version",
        "created": version.created,
        "bytes": version.bytes,
        "codec": version.codec,
        "bits_per_param": version.bits_per_param,
        "description": version.description,
        "exemplar_count": version.exemplar_count,
        "current": current,
    }


def details_answer(
    record: ExpertRecord, header: ExpertHeader, layers: Mapping[str, Spent], services: Services, by: Caller
) -> ExpertDetails:
    """One expert, and how its file was made."""
    return {
        **expert_answer(record, services, by),
        "routed": services.library.routing(record) is Routing.READY,
        "routing_reason": _REASONS[services.library.routing(record)].format(name=record.name),
        "codec_params": dict(header.codec_params),
        "tool": header.tool,
        "tensors": _tensors(header),
        "layers": [_layer(name, spent) for name, spent in layers.items()],
    }


_REASONS = {
    Routing.NONE: "it has no exemplars, so that no prompt is routed to it and it is reached by its name only: "
    "PUT /v1/experts/{name}/exemplars gives it some",
    Routing.PENDING: "the router does not know its exemplars yet; until then it is reached by its name only",
    Routing.READY: "prompts that are like its exemplars are routed to it",
}


def _tier(digest: str, services: Services) -> Literal["device", "host", "store"]:
    held = services.engine.holdings()
    if digest in held[Tier.DEVICE]:
        return "device"
    return "host" if digest in held[Tier.HOST] else "store"


def _signer(record: ExpertRecord, services: Services) -> SignedBy | None:
    signer = services.library.signer(record)
    return None if signer is None else {"name": signer.name, "fingerprint": signer.fingerprint}


def _layer(name: str, spent: Spent) -> LayerSpent:
    return {
        "layer": name,
        "parameters": spent.parameters,
        "nonzeros": spent.nonzeros,
        "bytes": spent.bytes,
        "density": spent.density,
        "bits_per_param": spent.bits_per_param,
        "bit_width": spent.bit_width,
    }


def _tensors(header: ExpertHeader) -> Tensors:
    entries = list(header.tensors.values())
    sparse = [entry for entry in entries if isinstance(entry, SparseEntry)]
    return {
        "ternary": len(sparse),
        "dense": len(entries) - len(sparse),
        "elements": sum(entry.numel for entry in entries),
        "nonzeros": sum(entry.nnz if isinstance(entry, SparseEntry) else entry.numel for entry in entries),
    }
