"""Start a server: base, store, registry, router, engine, HTTP, and a screen that says what is going on."""

from __future__ import annotations

import asyncio
import json
import logging
import shlex
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import uvicorn
from fastapi import FastAPI
from rich.console import Console
from rich.markup import escape

from server.api.services import Services
from server.assembly import assembled
from server.generation import AUTO
from server.logs import set_up
from server.protocol import BoundedProtocol
from server.settings import Settings
from store.access import Visibility
from store.errors import SwitchyardError
from store.record import ExpertRecord
from store.registry import Registry

log = logging.getLogger(__name__)

_LAST_WORDS = 5
"""Seconds that clients get to read why their answers end, after the time to drain."""

_UNRELATED_PROMPT = "What is the tallest mountain in Africa?"


def serve(settings: Settings, out: Console, *, preload: Path | None = None) -> None:
    """Run a server until it is told to stop (SIGINT, SIGTERM: answers in progress get `drain_seconds` to end).

    Args:
        preload: a folder of expert files to publish first, where they are not there yet.

    Raises:
        SwitchyardError: the base, the store or a setting is unusable.
    """
    set_up(settings.log_format, out)
    if settings.log_format == "json":  # nothing but JSON may come between two lines of JSON
        out = Console(quiet=True)
    started = time.monotonic()
    with assembled(settings, out, preload=preload) as house:
        server = _Server(house.app, settings, house.registry, out, started, with_key=house.has_keys)
        # uvicorn passes a signal on to whoever handled it before; a graceful end is no failure.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: None)
        server.run()


def listening(app: FastAPI, settings: Settings) -> uvicorn.Config:
    """How an application is served: where, and within which bounds."""
    protocol = type("Protocol", (BoundedProtocol,), {"patience": settings.client_seconds})
    return uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        http=protocol,
        log_config=None,
        access_log=False,
        server_header=False,
        ws="none",
        timeout_graceful_shutdown=settings.drain_seconds + _LAST_WORDS,
    )


class _Server(uvicorn.Server):
    """uvicorn, with a last word at the end of the start-up."""

    def __init__(
        self, app: FastAPI, settings: Settings, registry: Registry, out: Console, started: float, *, with_key: bool
    ) -> None:
        super().__init__(listening(app, settings))
        self._app = app
        self._settings = settings
        self._registry = registry
        self._out = out
        self._began = started
        self._with_key = with_key

    async def startup(self, sockets: list[object] | None = None) -> None:  # type: ignore[override]
        await super().startup(sockets)  # type: ignore[arg-type]
        if self.started:
            self._announcing = asyncio.create_task(self._announce())

    async def shutdown(self, sockets: list[object] | None = None) -> None:  # type: ignore[override]
        closing = self._app.state.services.closing
        ending = asyncio.get_running_loop().call_later(self._settings.drain_seconds, closing.end)
        try:
            await super().shutdown(sockets)  # type: ignore[arg-type]
        finally:
            ending.cancel()

    async def _announce(self) -> None:
        """Say how to talk to the server, once the router knows its experts."""
        services: Services = self._app.state.services
        while not services.ready and not self.should_exit:
            await asyncio.sleep(0.05)
        port = self.servers[0].sockets[0].getsockname()[1]
        host = f"[{self._settings.host}]" if ":" in self._settings.host else self._settings.host
        experts = self._registry.list()
        names = ", ".join(record.name for record in experts) or "none yet: switchyard push FILE adds one"
        self._out.print(f"{len(experts)} experts: {escape(names)}")
        if self._out.quiet:
            log.info("ready", extra={"experts": len(experts), "port": port, "seconds": time.monotonic() - self._began})
        self._out.print(f"[green]ready[/] after {time.monotonic() - self._began:.1f} s at http://{host}:{port}\n")
        for title, command in curl_lines(f"http://{host}:{port}", experts, self._registry, self._with_key):
            self._out.print(f"[dim]# {escape(title)}[/]")
            # Whole lines, whatever the width of the window: they are there to be copied.
            self._out.print(command, markup=False, highlight=False, soft_wrap=True)


def curl_lines(url: str, experts: Sequence[ExpertRecord], registry: Registry, with_key: bool) -> list[tuple[str, str]]:
    """Commands that show what the server does: `[(what, command)]`.

    Prompts are from the files of experts that everybody may use: those that were given later may be what somebody has
    asked, and a screen is a log.
    """
    public = [record for record in experts if record.access.visibility is Visibility.PUBLIC]
    taught = [record for record in public if record.exemplar_count and record.exemplars_digest is None]
    lines: list[tuple[str, str, str]] = []
    with suppress(SwitchyardError):  # a damaged file is told of elsewhere
        if taught:
            named, routed = taught[0], taught[-1]
            lines.append((f"the expert {named.name}, by name", named.name, registry.exemplars(named)[0]))
            lines.append((f"routed by what it says (to {routed.name})", AUTO, registry.exemplars(routed)[-1]))
    lines.append(("nothing an expert knows: the base answers", AUTO, _UNRELATED_PROMPT))
    return [(title, _curl(url, model, prompt, with_key)) for title, model, prompt in lines]


def _curl(url: str, model: str, prompt: str, with_key: bool) -> str:
    body = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 0,
        "max_tokens": 48,
    }
    key = '-H "Authorization: Bearer $SWITCHYARD_API_KEY" ' if with_key else ""
    quoted = shlex.quote(json.dumps(body, ensure_ascii=False))
    return f"curl -s {url}/v1/chat/completions {key}-H 'content-type: application/json' -d {quoted}"
