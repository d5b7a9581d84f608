"""The server that clients are checked against, and what a check must know of it. Imports no client."""

from __future__ import annotations

import json
import re
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

Fault = TypeVar("Fault", bound=Exception)
ATTEMPTS = 5
WAIT_SECONDS = 30.0
_GONE = re.compile(r'^switchyard_failures_total\{code="client_disconnected"\} (\S+)', re.MULTILINE)


@dataclass(frozen=True)
class Target:
    """A live server.

    Attributes:
        url: its address, without `/v1`.
        experts: names of two experts.
        routed: a prompt, and the mix that `model: auto` gives it, as the header tells it.
        letter, letter_token: a token and its text.
        brace_token: the token of `}`.
        failing: the address of another server, whose engine fails in the middle of every answer; with the same key.
        failing_model: its base.
        base_folder: the checkpoint that it serves, or empty if that is no folder here.
        folder: scratch space.
    """

    url: str
    key: str
    base: str
    experts: tuple[str, str]
    routed: tuple[str, str]
    context: int
    letter: str
    letter_token: int
    brace_token: int
    failing: str
    failing_model: str
    base_folder: str
    folder: str

    @property
    def v1(self) -> str:
        return f"{self.url}/v1"

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Target:
        given: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in json.loads(text).items()
        }
        return cls(**given)

    def get(self, path: str) -> str:
        """The body of a GET."""
        return self._ask(path, None)

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """The parsed answer to a POST."""
        return json.loads(self._ask(path, json.dumps(body).encode()))

    def _ask(self, path: str, body: bytes | None) -> str:
        headers = {"authorization": f"Bearer {self.key}", "content-type": "application/json"}
        with urllib.request.urlopen(urllib.request.Request(self.url + path, body, headers), timeout=60) as answer:
            text: str = answer.read().decode()
        return text

    def gone(self) -> float:
        """How many answers the server gave up because their clients had gone."""
        found = _GONE.search(self.get("/metrics"))
        return float(found.group(1)) if found else 0.0


QUESTION = "the river 77 is long"
MESSAGES: list[Any] = [{"role": "user", "content": QUESTION}]
TRIP: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "plan", "description": "Plan a trip.", "parameters": TRIP},
}


def check_trip(trip: Mapping[str, Any]) -> None:
    """Whether it satisfies `TRIP`."""
    assert set(trip) == {"city", "days"}, trip
    assert trip["city"] in ("Rome", "Oslo"), trip
    assert 1 <= trip["days"] <= 9, trip


def raised(kind: type[Fault], ask: Callable[[], object]) -> Fault:
    """The error that asking ends in."""
    try:
        ask()
    except kind as error:
        return error
    raise AssertionError(f"there was no {kind.__name__}")


def check_cancelled(target: Target, give_up: Callable[[], object]) -> None:
    """Whether a stream that a client gives up ends on the server. One that was too quick is asked for again."""
    before = target.gone()
    for _ in range(ATTEMPTS):
        give_up()
        deadline = time.monotonic() + WAIT_SECONDS
        while time.monotonic() < deadline:
            if target.gone() > before:
                return
            time.sleep(0.05)
    raise AssertionError("the server went on with an answer that nobody reads")


def check_echo(prompt: str, text: str, tokens: Sequence[str], logprobs: Sequence[float | None]) -> list[float]:
    """Whether an echo tells of every token of the prompt; returns their log-probabilities, but the first."""
    assert text.startswith(prompt), text
    assert "".join(tokens).startswith(prompt), tokens
    assert logprobs[0] is None, "nothing comes before the first token"
    told = [value for value in logprobs[1:] if value is not None]
    assert len(told) == len(tokens) - 1
    assert all(value <= 0 for value in told), told
    return told
