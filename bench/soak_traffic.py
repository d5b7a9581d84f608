"""What a soak asks a server for, at random: answers of every kind, broken off ones too, while experts change."""

from __future__ import annotations

import json
import queue
import random
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import httpx

from bench.soak_oracle import Names, Oracle, exemplars, mix_of, prompts
from store.mix import Mix

BASE = "tiny"
WEIGHTS = (0.5, 1.0, 1.5, -0.5)
LENGTHS = (1, 8, 24)
_GREEDY = 0.8
"""Share of the requests whose answer is compared; the others are sampled."""
_CANCELLED = 0.15
_AFTER_CANCEL = 3
_PAUSE = 0.1
_CHANGE_SECONDS = 1.0
"""Seconds between two changes, on average."""
_REPLACED = 0.6


@dataclass(frozen=True)
class Heard:
    """A greedy answer that waits to be compared."""

    mix: Mix
    prompt: tuple[int, ...]
    max_tokens: int
    text: str
    pieces: list[bytes] | None


@dataclass
class Record:
    """What a soak has seen. Thread-safe enough: counters are merged under a lock."""

    counts: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    heard: queue.Queue[Heard | None] = field(default_factory=lambda: queue.Queue(2000))
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, what: str) -> None:
        with self._lock:
            self.counts[what] += 1

    def fail(self, what: str) -> None:
        """Note something that must not happen."""
        with self._lock:
            self.counts["failures"] += 1
            if len(self.failures) < 20:
                self.failures.append(what[:500])


@dataclass(frozen=True)
class Scene:
    """What all clients of one soak share: the server, who answers by which name, and the book that all write in."""

    url: str
    oracle: Oracle
    called: list[str]
    names: Names = field(default_factory=Names)
    record: Record = field(default_factory=Record)
    over: threading.Event = field(default_factory=threading.Event)


class Asker(threading.Thread):
    """One client: a request after the other until told to stop."""

    def __init__(self, scene: Scene, seed: int) -> None:
        super().__init__(daemon=True)
        self._oracle, self._names, self._called, self._record = scene.oracle, scene.names, scene.called, scene.record
        self._url, self._over = scene.url, scene.over
        self._http = httpx.Client(base_url=scene.url, timeout=120)
        self._dice = random.Random(seed)
        self._prompts = prompts(0)

    def run(self) -> None:
        while not self._over.wait(self._dice.random() * _PAUSE):
            try:
                self._ask()
            except Exception as error:
                self._record.fail(f"{type(error).__name__}: {error}")

    def _ask(self) -> None:
        dice = self._dice
        _, prompt = dice.choice(self._prompts)
        chat, max_tokens, greedy = dice.random() < 0.5, dice.choice(LENGTHS), dice.random() < _GREEDY
        body: dict[str, Any] = {"max_tokens": max_tokens, "temperature": 0.0 if greedy else 1.0}
        kind = dice.choices(("named", "base", "mix", "auto"), (5, 1, 2, 2))[0]
        asked = self._choose(kind, body)
        if chat:
            body |= {"messages": [{"role": "user", "content": prompt}], "logprobs": dice.random() < 0.5}
        else:
            body["prompt"] = prompt
        path = "/v1/chat/completions" if chat else "/v1/completions"
        if dice.random() < 0.5:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        began = time.monotonic()
        if dice.random() < _CANCELLED:
            self._break_off(path, body)
            return
        status, answer = self._stream(path, body) if body.get("stream") else self._whole(path, body)
        self._record.count(f"{kind}, {'chat' if chat else 'completion'}{', stream' if body.get('stream') else ''}")
        if status != 200:
            self._refused(status, answer, asked, began)
            return
        text, pieces, parts = _said(answer, chat)
        for part in parts:
            if part["digest"] not in self._names.possible(part["id"], began, time.monotonic()):
                self._record.fail(f"{kind}: {part['id']} was answered by {part['digest'][:12]}, which it did not mean")
        if greedy:
            tokens = self._oracle.encode(prompt, chat=chat)
            self._record.heard.put(Heard(mix_of(parts), tokens, max_tokens, text, pieces))

    def _choose(self, kind: str, body: dict[str, Any]) -> list[str]:
        """Say in a request's body who shall answer; the names of experts that it names."""
        if kind == "named":
            asked = [self._dice.choice(self._called)]
            body["model"] = asked[0]
            return asked
        body["model"] = BASE if kind == "base" else "auto"
        if kind != "mix":
            return []
        asked = self._dice.sample(self._called, 2)
        body["experts"] = [{"id": name, "weight": self._dice.choice(WEIGHTS)} for name in asked]
        return asked

    def _whole(self, path: str, body: dict[str, Any]) -> tuple[int, list[Any]]:
        response = self._http.post(path, json=body)
        return response.status_code, [response.json()]

    def _stream(self, path: str, body: dict[str, Any]) -> tuple[int, list[Any]]:
        with self._http.stream("POST", path, json=body) as response:
            if response.status_code != 200:
                return response.status_code, [json.loads(response.read())]
            lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
        if lines[-1:] != ["[DONE]"]:
            self._record.fail(f"a stream ended without its end: {lines[-1:]}")
        return 200, [json.loads(line) for line in lines if line != "[DONE]"]

    def _break_off(self, path: str, body: dict[str, Any]) -> None:
        """Go away: before the answer, or in the middle of a stream."""
        self._record.count("broken off")
        body["max_tokens"] = 300
        # A connection of its own: closing it is what the server sees.
        with httpx.Client(base_url=self._url, timeout=120) as http:
            if not body.get("stream"):
                with suppress(httpx.TimeoutException):
                    http.post(path, json=body, timeout=0.01 + self._dice.random() * 0.05)
                return
            with http.stream("POST", path, json=body) as response:
                for seen, _ in enumerate(response.iter_lines()):
                    if seen >= _AFTER_CANCEL:
                        return

    def _refused(self, status: int, answer: list[Any], asked: list[str], began: float) -> None:
        gone = any(None in self._names.possible(name, began, time.monotonic()) for name in asked)
        if status == 404 and gone:
            self._record.count("refused, for it was deleted")
        elif status == 429:
            self._record.count("refused, for the queue was full")
        else:
            self._record.fail(f"{status}: {answer}")


class Changer(threading.Thread):
    """Publishes, replaces, rolls back and deletes experts, one change after the other."""

    def __init__(self, scene: Scene, seed: int) -> None:
        super().__init__(daemon=True)
        self._oracle, self._names, self._called, self._record = scene.oracle, scene.names, scene.called, scene.record
        self._http = httpx.Client(base_url=scene.url, timeout=120)
        self._over = scene.over
        self._dice = random.Random(seed)

    def publish_all(self) -> None:
        """Let every name point to something."""
        for name in self._called:
            self._put(name)

    def run(self) -> None:
        while not self._over.wait(self._dice.random() * 2 * _CHANGE_SECONDS):
            name = self._dice.choice(self._called)
            try:
                if self._names.current(name) is None or self._dice.random() < _REPLACED:
                    self._put(name)
                else:
                    self._dice.choice((self._roll_back, self._remove))(name)
            except Exception as error:
                self._record.fail(f"a change of {name}: {type(error).__name__}: {error}")

    def _put(self, name: str) -> None:
        digest = self._dice.choice(self._oracle.digests)
        file = self._oracle.library.files[digest].read_bytes()
        theme = exemplars(self._called.index(name))
        with self._names.change(name, digest):
            response = self._http.put(f"/v1/experts/{name}", files={"file": ("e", file)}, data={"exemplars": theme})
            response.raise_for_status()
        self._record.count("published or replaced")

    def _roll_back(self, name: str) -> None:
        versions = self._http.get(f"/v1/experts/{name}/versions").raise_for_status().json()["data"]
        if len(versions) < 2:
            return
        with self._names.change(name, versions[1]["digest"]):
            self._http.post(f"/v1/experts/{name}/rollback", json={}).raise_for_status()
        self._record.count("rolled back")

    def _remove(self, name: str) -> None:
        with self._names.change(name, None):
            self._http.delete(f"/v1/experts/{name}").raise_for_status()
        self._record.count("deleted")


def _said(answer: list[Any], chat: bool) -> tuple[str, list[bytes] | None, list[Any]]:
    """Text, the tokens' bytes where they were asked for, and the parts of the mix."""
    text, told = "", list[bytes]()
    for choice in (choice for chunk in answer for choice in chunk["choices"]):
        if chat:
            said = choice.get("message") or choice["delta"]
            text += said.get("content") or ""
        else:
            text += choice["text"]
        if chat and choice.get("logprobs"):
            told += [bytes(entry["bytes"]) for entry in choice["logprobs"]["content"]]
    return text, told or None, answer[-1]["usage"]["switchyard"]["mix"]
