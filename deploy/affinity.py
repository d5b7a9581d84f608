"""Which replica a request had better go to: the one that holds its expert already. Knows nothing of Ray."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

CONTROL = "@control"
"""Wanted by what changes the library: one replica does it all, so that what belongs together meets. No expert's name
can look like this."""

AUTO = "auto"
"""The model name that asks for routing."""
_GENERATING = frozenset({"/v1/chat/completions", "/v1/completions"})
_ASKING = (*_GENERATING, "/v1/embeddings", "/v1/route", "/v1/models", "/v1/experts", "/tokenize", "/detokenize")
_LOCAL = ("/v1/uploads", "/v1/jobs", "/v1/experts/jobs")
"""What one replica knows and the others do not, to be read where it was written."""
_TEXT = 2000
"""Characters of a prompt that routing is asked about beforehand: it looks at its first tokens only."""


@dataclass(frozen=True)
class Need:
    """What a request needs most: `expert` (or `CONTROL`), whatever expert is for `text`, or nothing in particular."""

    expert: str = ""
    text: str = ""


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


def needs(method: str, path: str, body: bytes, *, base: str) -> Need:
    """What a request needs most. Whatever is wrong with it is left to the replica to say.

    Args:
        base: what clients call it.
    """
    reads = method in ("GET", "HEAD")
    if _below(path, _LOCAL) or not (reads or path in _ASKING) or (not reads and _below(path, ("/v1/experts",))):
        return Need(CONTROL)
    if method != "POST" or path not in _GENERATING:
        return Need()
    try:
        request = json.loads(body)
    except ValueError:
        return Need()
    if not isinstance(request, dict):
        return Need()
    if mix := _heaviest(request.get("experts")):
        return Need(mix)
    model = request.get("model")
    if not isinstance(model, str) or model == base:
        return Need()
    return Need(text=_question(request)) if model == AUTO else Need(model)


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


def _question(request: Mapping[str, Any]) -> str:
    """The beginning of what routing would look at: the last message of the user, or the prompt."""
    messages = request.get("messages")
    found: object = request.get("prompt")
    for message in messages if isinstance(messages, list) else ():
        if isinstance(message, dict) and message.get("role") == "user":
            found = message.get("content")
    return found[:_TEXT] if isinstance(found, str) else ""


def _below(path: str, prefixes: Sequence[str]) -> bool:
    return any(path == prefix or path.startswith(f"{prefix}/") for prefix in prefixes)


def _affinity(name: str, replica: str) -> bytes:
    return hashlib.sha256(f"{name}\n{replica}".encode()).digest()
