"""A small HTTP client of a running server, for the command line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx

from store.errors import SwitchyardError

Json = dict[str, Any]


class ServerError(SwitchyardError):
    """The server refused, or cannot be reached; the message is the server's own where there is one."""

    code = "server_error"


class UnreachableError(ServerError):
    """The server is not there, or the connection broke."""


@dataclass
class ChatTurn:
    """An answer that is being streamed: iterate for its text; `mix` and `usage` are there once it has ended."""

    pieces: Iterator[str]
    mix: str = ""
    usage: Json = field(default_factory=dict)

    def __iter__(self) -> Iterator[str]:
        return self.pieces


class Client:
    """Calls of the HTTP API; see docs/api.md.

    Raises from every method:
        ServerError: the server refused or is not there.
    """

    def __init__(self, server: str, api_key: str | None = None) -> None:
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        # A first answer may wait for a cold expert; an upload for its validation.
        timeout = httpx.Timeout(10.0, read=600.0, write=600.0)
        self._http = httpx.Client(base_url=server, headers=headers, timeout=timeout)

    def push(
        self,
        file: Path,
        *,
        name: str | None,
        exemplars: Path | None,
        replace: bool = False,
        signature: str | None = None,
    ) -> tuple[Json, bool]:
        """Upload an expert file. Returns its record, and whether there was none of that name.

        Args:
            replace: what `name` points to, which must be given then.
        """
        with file.open("rb") as body:
            files: dict[str, Any] = {"file": (file.name, body, "application/octet-stream")}
            if signature is not None:
                files["signature"] = (None, signature)
            if exemplars is not None:
                files["exemplars"] = (exemplars.name, exemplars.read_bytes(), "application/jsonl")
            if replace:
                response = self._send("PUT", f"/v1/experts/{quote(name or '', safe='')}", files=files)
            else:
                response = self._send("POST", "/v1/experts", files=files, data={"name": name} if name else {})
        return response.json(), response.status_code == httpx.codes.CREATED

    def create_job(self, body: Json) -> Json:
        """Have uploads compressed into an expert; `body` as `POST /v1/jobs` takes it."""
        job: Json = self._send("POST", "/v1/jobs", json=body).json()
        return job

    def watch_job(self, job_id: str) -> Iterator[Json]:
        """A job whenever it has changed, until it has ended."""
        is_there = True
        while is_there:
            is_there = False
            try:
                for job in self._job_events(job_id):
                    is_there = True
                    yield job
                return
            except httpx.ReadTimeout as error:  # nothing new for long, or nobody there: another look tells
                if not is_there:
                    raise self._unreachable(error) from error
            except httpx.TransportError as error:
                raise self._unreachable(error) from error

    def _job_events(self, job_id: str) -> Iterator[Json]:
        with self._http.stream("GET", f"/v1/jobs/{job_id}/events") as response:
            if response.is_error:
                response.read()
                raise _refusal(response)
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line.removeprefix("data: "))
                    if "status" not in event:  # not a job: why the server says no more
                        raise ServerError(event["error"]["message"], code=event["error"].get("code"))
                    yield event

    def cancel_job(self, job_id: str) -> None:
        """End a job that waits or runs."""
        self._send("DELETE", f"/v1/jobs/{job_id}")

    def create_upload(self, filename: str, size: int, sha256: str) -> Json:
        """Declare a file that comes in pieces, or find the one that was begun: `id`, and its `offset`."""
        upload: Json = self._send(
            "POST", "/v1/uploads", json={"filename": filename, "bytes": size, "sha256": sha256}
        ).json()
        return upload

    def upload_offset(self, upload_id: str) -> int:
        """How much of an upload has arrived, in bytes."""
        return int(self._send("HEAD", f"/v1/uploads/{upload_id}").headers["upload-offset"])

    def append(self, upload_id: str, offset: int, length: int, pieces: Iterator[bytes]) -> None:
        """Send a piece of an upload: `length` bytes, from `offset` on."""
        headers = {
            "Upload-Offset": str(offset),
            "Content-Type": "application/offset+octet-stream",
            "Content-Length": str(length),
        }
        self._send("PATCH", f"/v1/uploads/{upload_id}", content=pieces, headers=headers)

    def publish_upload(
        self,
        upload_id: str,
        *,
        name: str | None,
        exemplars: list[str] | None,
        replace: bool = False,
        signature: str | None = None,
    ) -> tuple[Json, bool]:
        """Publish an upload that has arrived; as `push`."""
        body = {"upload": upload_id, "exemplars": exemplars, "signature": signature}
        if replace:
            response = self._send("PUT", f"/v1/experts/{quote(name or '', safe='')}", json=body)
        else:
            response = self._send("POST", "/v1/experts", json=body | {"name": name})
        return response.json(), response.status_code == httpx.codes.CREATED

    def experts(self, *, query: str = "", tags: Sequence[str] = ()) -> list[Json]:
        """Experts, by name: all, or those with all these tags and these letters in what is said about them."""
        listed: list[Json] = []
        more = True
        while more:
            after = listed[-1]["id"] if listed else ""
            page = self._send("GET", "/v1/experts", params={"q": query, "tag": list(tags), "after": after}).json()
            listed, more = listed + page["data"], page["has_more"]
        return listed

    def roll_back(self, name: str, digest: str | None) -> Json:
        """Let a name point to an earlier version; None is the latest one."""
        record: Json = self._send(
            "POST", f"/v1/experts/{quote(name, safe='')}/rollback", json={"digest": digest}
        ).json()
        return record

    def describe(self, name: str, changes: Json) -> Json:
        """Change description, tags or metadata of an expert."""
        record: Json = self._send("PATCH", f"/v1/experts/{quote(name, safe='')}", json=changes).json()
        return record

    def remove(self, name: str, *, force: bool = False) -> None:
        """Remove an expert; with `force`, its aliases too."""
        self._send("DELETE", f"/v1/experts/{quote(name, safe='')}", params={"force": force})

    def exemplars(self, name: str) -> list[str]:
        """The prompts that an expert is found by."""
        found: list[str] = self._send("GET", f"/v1/experts/{quote(name, safe='')}/exemplars").json()["exemplars"]
        return found

    def set_exemplars(self, name: str, exemplars: Sequence[str] | None) -> Json:
        """Let an expert be found by other prompts; None goes back to those in its file."""
        path = f"/v1/experts/{quote(name, safe='')}/exemplars"
        if exemplars is None:
            reset: Json = self._send("DELETE", path).json()
            return reset
        record: Json = self._send("PUT", path, json={"exemplars": list(exemplars)}).json()
        return record

    def put_alias(self, alias: str, target: str) -> None:
        """Let an alias point to an expert."""
        self._send("PUT", f"/v1/aliases/{quote(alias, safe='')}", json={"target": target})

    def remove_alias(self, alias: str) -> None:
        """Take an alias away."""
        self._send("DELETE", f"/v1/aliases/{quote(alias, safe='')}")

    def keys(self) -> list[Json]:
        """All API keys, without their secrets."""
        listed: list[Json] = self._send("GET", "/v1/admin/keys").json()["data"]
        return listed

    def create_key(self, **given: Any) -> Json:
        """Make an API key; see docs/api.md. What it is called is under `key`."""
        key: Json = self._send("POST", "/v1/admin/keys", json=given).json()
        return key

    def usage(self, month: str | None) -> list[Json]:
        """What every tenant spent in a month ("2026-11"; None is this one)."""
        found: list[Json] = self._send("GET", "/v1/admin/usage", params={"month": month} if month else {}).json()[
            "data"
        ]
        return found

    def set_limits(self, tenant: str, limits: Json) -> Json:
        """Give a tenant limits of its own; returns what it may."""
        given: Json = self._send("PUT", f"/v1/admin/tenants/{quote(tenant, safe='')}", json=limits).json()
        return given

    def reset_limits(self, tenant: str) -> Json:
        """Let a tenant have the usual limits again; returns what it may."""
        given: Json = self._send("DELETE", f"/v1/admin/tenants/{quote(tenant, safe='')}").json()
        return given

    def revoke_key(self, key_id: str) -> None:
        self._send("DELETE", f"/v1/admin/keys/{quote(key_id, safe='')}")

    def route(self, prompt: str) -> Json:
        decision: Json = self._send("POST", "/v1/route", json={"prompt": prompt}).json()
        return decision

    def route_report(self, experts: int) -> Json:
        """How well experts are told apart, of at most so many; see docs/api.md."""
        report: Json = self._send("GET", "/v1/route/report", params={"experts": experts}).json()
        return report

    def chat(self, messages: list[dict[str, str]], *, model: str, **options: Any) -> ChatTurn:
        """Stream one answer; `options` are further fields of the request (`temperature`, `experts`, ...)."""
        body = {"model": model, "messages": messages, "stream": True, "stream_options": {"include_usage": True}}
        turn = ChatTurn(iter(()))
        turn.pieces = self._stream(turn, body | options)
        return turn

    def _stream(self, turn: ChatTurn, body: Json) -> Iterator[str]:
        try:
            with self._http.stream("POST", "/v1/chat/completions", json=body) as response:
                if response.is_error:
                    response.read()
                    raise _refusal(response)
                turn.mix = response.headers.get("x-switchyard-mix", "")
                for line in response.iter_lines():
                    data = line.removeprefix("data: ")
                    if not line.startswith("data: ") or data == "[DONE]":
                        continue
                    chunk = json.loads(data)
                    if "error" in chunk:
                        raise ServerError(chunk["error"]["message"], code=chunk["error"].get("code"))
                    turn.usage = chunk.get("usage") or turn.usage
                    for choice in chunk["choices"]:
                        yield choice["delta"].get("content") or ""
        except httpx.TransportError as error:
            raise self._unreachable(error) from error

    def _send(self, method: str, path: str, **request: Any) -> httpx.Response:
        try:
            response = self._http.request(method, path, **request)
        except httpx.TransportError as error:
            raise self._unreachable(error) from error
        if response.is_error:
            raise _refusal(response)
        return response

    def _unreachable(self, error: httpx.TransportError) -> UnreachableError:
        return UnreachableError(f"no answer from {self._http.base_url}: {error}; is `switchyard serve` running there?")


def _refusal(response: httpx.Response) -> ServerError:
    try:
        error = response.json()["error"]
        return ServerError(error["message"], param=error.get("param"), code=error.get("code"))
    except (ValueError, KeyError, TypeError):
        return ServerError(f"the server answered {response.status_code} {response.reason_phrase}")
