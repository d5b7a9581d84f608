"""Which replica a request had better go to: the one that holds its expert already. Knows nothing of Ray."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

CONTROL = "@control"
"""Wanted by what changes the library: one replica does it all, so that what belongs together meets. No expert's name
can look like this."""

_GENERATING = frozenset({"/v1/chat/completions", "/v1/completions"})
_CHANGING = ("/v1/experts", "/v1/uploads", "/v1/jobs")


@dataclass(frozen=True)
class Holdings:
    """Names of the experts that one replica has decoded: on its device, and in its host's memory."""

    device: frozenset[str] = field(default_factory=frozenset)
    host: frozenset[str] = field(default_factory=frozenset)

    @classmethod
    def of(cls, stats: Mapping[str, Any]) -> Holdings:
        """From what a replica reports; what it has not reported yet it does not hold."""
        return cls(frozenset(stats.get("device", ())), frozenset(stats.get("host", ())))

    def rank(self, name: str) -> int:
        """0 on the device, 1 in host memory, 2 nowhere near."""
        return 0 if name in self.device else 1 if name in self.host else 2


def wanted(method: str, path: str, body: bytes, *, not_experts: Collection[str]) -> str:
    """The expert that a request needs most, `CONTROL`, or "" where any replica will do.

    Whatever is wrong with the request is left to the replica to say.

    Args:
        not_experts: models that no expert is called: the base, and `auto`.
    """
    if any(path == prefix or path.startswith(f"{prefix}/") for prefix in _CHANGING):
        is_reading = method in ("GET", "HEAD") and path.startswith("/v1/experts")
        return "" if is_reading else CONTROL
    if method != "POST" or path not in _GENERATING:
        return ""
    try:
        request = json.loads(body)
    except ValueError:
        return ""
    if not isinstance(request, dict):
        return ""
    mix = _heaviest(request.get("experts"))
    model = request.get("model")
    if mix or not isinstance(model, str) or model in not_experts:
        return mix
    return model


def ranked(name: str, holdings: Mapping[str, Holdings]) -> list[list[str]]:
    """Replicas in the order in which to try them; those of one group are as good as each other.

    First who has the expert on the device, then who has it in host memory, then the one that its name's hash prefers
    (rendezvous hashing: without a word between them all routers agree, and a replica that comes or goes moves only its
    own share of the experts), then all others.

    Args:
        name: the expert, or `CONTROL`.
        holdings: of each replica, by id.
    """
    groups: list[list[str]] = [[], [], [], []]
    favourite = max(holdings, key=lambda replica: _affinity(name, replica), default=None)
    for replica in sorted(holdings):
        rank = holdings[replica].rank(name)
        groups[3 if rank == 2 and replica != favourite else rank].append(replica)
    return [group for group in groups if group]


def _heaviest(experts: object) -> str:
    """The expert with the largest weight of an explicit mix; "" if it is none."""
    best: tuple[float, str] = (0.0, "")
    for part in experts if isinstance(experts, Sequence) and not isinstance(experts, str) else ():
        if isinstance(part, dict) and isinstance(part.get("id"), str):
            weight = part.get("weight", 1.0)
            if isinstance(weight, int | float) and abs(weight) > best[0]:
                best = (abs(weight), part["id"])
    return best[1]


def _affinity(name: str, replica: str) -> bytes:
    return hashlib.sha256(f"{name}\n{replica}".encode()).digest()
