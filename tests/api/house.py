"""A whole server around the dummy engine, in this process."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI
from openai import AsyncOpenAI

from router.features import FeatureCache
from router.router import Router
from server.app import create_app
from server.settings import Settings
from store.backends import BlobStore
from store.backends.disk import DiskStore
from store.backends.disk_ledger import DiskLedger
from store.backends.ledger import Ledger
from store.expert_file import validate, write_expert
from store.expert_header import ExpertHeader
from store.expert_info import ExpertInfo
from store.packed import PackedDense
from store.record import ExpertRecord
from store.registry import Registry
from store.trust import Trust, trusted_keys
from tests.api.dummy_engine import MANIFEST, DummyEngine

BASE = "dummy-base"
CRON = [f"run the backup job every {n} minutes" for n in range(1, 13)]
ROOT = {"authorization": "Bearer root"}
"""Of a house that was opened with `api_keys="root"`."""
FRENCH = [f"translate into french the sentence number {n}" for n in range(1, 13)]


def make_expert(path: Path, *, value: int = 1, **info: Any) -> Path:
    """A small, valid expert file; another `value` makes another digest."""
    payload = value.to_bytes(2, "little") * 4
    write_expert(path, ExpertInfo(codec="raw", tool="tests", **info), {"norm": PackedDense((4,), payload)}, MANIFEST)
    return path


@dataclass
class House:
    """A server that has started, and a client of it."""

    settings: Settings
    engine: DummyEngine
    registry: Registry
    app: FastAPI
    http: httpx.AsyncClient
    folder: Path

    @property
    def quarantined(self) -> list[str]:
        """What waits in quarantine."""
        return [path.name for path in self.folder.glob("data/quarantine/*/*") if path.name != ".lock"]

    def openai(self, key: str = "none") -> AsyncOpenAI:
        """The official client, over ASGI."""
        return AsyncOpenAI(api_key=key, base_url="http://localhost/v1", http_client=self.http, max_retries=0)

    def publish(self, name: str, *, value: int = 1, exemplars: Sequence[str] = ()) -> ExpertRecord:
        """Put an expert into the registry, behind the server's back."""
        path = make_expert(self.folder / f"{name}.expert", value=value, name=name, exemplars=tuple(exemplars))
        return self.registry.publish(path)[0]

    async def upload(self, path: Path, **fields: Any) -> httpx.Response:
        """POST an expert file."""
        return await self.http.post("/v1/experts", files={"file": (path.name, path.read_bytes())}, data=fields)

    async def chat(self, text: str = "hello", **body: Any) -> httpx.Response:
        """POST a conversation of one turn to the base."""
        given = {"model": BASE, "messages": [{"role": "user", "content": text}], **body}
        return await self.http.post("/v1/chat/completions", json=given)

    async def complete(self, prompt: Any = "hello", **body: Any) -> httpx.Response:
        """POST a prompt to the base."""
        return await self.http.post("/v1/completions", json={"model": BASE, "prompt": prompt, **body})

    async def until_ready(self) -> None:
        """Wait for the router to be restored."""
        while (await self.http.get("/ready")).status_code != 200:
            await asyncio.sleep(0.001)


@asynccontextmanager
async def open_house(
    folder: Path,
    *,
    engine: DummyEngine | None = None,
    check: Callable[[Path], ExpertHeader] | None = None,
    base_folder: Path | None = None,
    wait: bool = True,
    ledger: Ledger | None = None,
    store: BlobStore | None = None,
    **settings: Any,
) -> AsyncIterator[House]:
    """Start a server whose data is in `folder`; its experts too, unless they are kept in another `store`."""
    engine = engine or DummyEngine()
    manifest = engine.base.manifest
    settings = {"routing_wait": 60.0} | settings
    given = Settings(base=BASE, data_dir=folder / "data", cache_dir=folder / "cache", **settings)
    store = store or DiskStore(given.data_dir)
    ledger = ledger or DiskLedger(given.data_dir / "ledger")
    trust = Trust(trusted_keys(given.trusted_keys), required=given.require_signature)
    registry = Registry(store, manifest, frozenset({BASE, "auto"}), trust)
    router = Router(engine.features, FeatureCache(folder / "cache", manifest.fingerprint, 0), given.router())
    app = create_app(
        given,
        engine=engine,
        registry=registry,
        ledger=ledger,
        router=router,
        quarantine=store.quarantine(),
        check=check or (lambda path: validate(path, manifest)),
        base_folder=base_folder or folder / "base",
    )
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://localhost") as http,
    ):
        house = House(given, engine, registry, app, http, folder)
        if wait:
            await house.until_ready()
        yield house
    ledger.close()
    store.close()


async def key_of(house: House, tenant: str) -> dict[str, str]:
    """The header of a new key of a tenant's, made by ROOT."""
    body = {"tenant": tenant, "roles": ["infer", "upload"]}
    made = await house.http.post("/v1/admin/keys", json=body, headers=ROOT)
    return {"authorization": f"Bearer {made.json()['key']}"}


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """The chunks of a streamed answer; checks that it ends as it should."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    blocks = response.text.split("\n\n")
    assert blocks[-2:] == ["data: [DONE]", ""]
    return [json.loads(block.removeprefix("data: ")) for block in blocks[:-2]]


def error(response: httpx.Response, status: int) -> dict[str, Any]:
    """The error of an answer; checks its shape."""
    assert response.status_code == status, response.text
    assert response.headers["x-request-id"]
    body = response.json()
    assert body.keys() == {"error"}
    assert body["error"].keys() == {"message", "type", "param", "code"}
    detail: dict[str, Any] = body["error"]
    return detail
