"""Start a server: base, store, registry, router, engine, HTTP, and a screen that says what is going on."""

from __future__ import annotations

import asyncio
import json
import logging
import shlex
import shutil
import signal
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import uvicorn
from fastapi import FastAPI
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from transformers.utils.logging import disable_progress_bar

from router.features import FeatureCache
from router.router import Router
from router.state import StateFile
from server.api.services import Services
from server.app import create_app
from server.engine.engine import TransformersEngine
from server.engine.model import resolve_base
from server.exposure import check_exposure
from server.generation import AUTO
from server.settings import Settings
from store.backends.opening import open_ledger, open_store
from store.errors import SwitchyardError
from store.fingerprint import manifest_of
from store.keys import Keys
from store.record import ExpertRecord
from store.registry import Registry
from store.validation import Validator

_UNRELATED_PROMPT = "What is the tallest mountain in Africa?"


def serve(settings: Settings, out: Console, *, preload: Path | None = None) -> None:
    """Run a server until it is told to stop (SIGINT, SIGTERM: answers in progress get half a minute to end).

    Args:
        preload: a folder of expert files to publish first, where they are not there yet.

    Raises:
        SwitchyardError: the base, the store or a setting is unusable.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[RichHandler(console=out, show_path=False)])
    for chatty in ("httpx", "uvicorn", "uvicorn.access", "faiss"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    disable_progress_bar()  # type: ignore[no-untyped-call]
    started = time.monotonic()
    address = settings.store or str(settings.data_dir)
    ledger = open_ledger(address)
    keys = Keys(ledger)
    check_exposure(settings, keys, out)
    with out.status(f"preparing the base {escape(settings.base)} (a GGUF file is converted once)"):
        folder = resolve_base(settings.base, settings.cache_dir)
        manifest = manifest_of(folder, settings.cache_dir)
    store = open_store(
        address,
        cache=settings.cache_dir / "store",
        cache_bytes=settings.store_cache_bytes,
    )
    validator = Validator(manifest)
    try:
        validator.start()
        registry = Registry(store, manifest, reserved=frozenset({AUTO, settings.served_base_name}))
        if preload is not None:
            with out.status(f"publishing the expert files of {escape(str(preload))}"):
                publish_folder(preload, registry, store.quarantine(), out)
        with out.status("loading the base"):
            engine = TransformersEngine(
                folder,
                name=settings.served_base_name,
                settings=settings.engine(),
                read_expert=registry.expert_bytes,
                cache_dir=settings.cache_dir,
            )
        base = engine.base
        variant = f"{base.dtype}, {settings.feature_tokens} tokens"
        fingerprint, layer = base.manifest.fingerprint, base.feature_layer
        features = FeatureCache(settings.cache_dir / "features", fingerprint, layer, variant=variant)
        given = settings.router()
        state = StateFile(settings.data_dir / "router" / "metric", f"{fingerprint} {layer} {variant} {given.metric}")
        router = Router(engine.features, features, given, state)
        app = create_app(
            settings,
            engine=engine,
            registry=registry,
            ledger=ledger,
            router=router,
            quarantine=store.quarantine(),
            check=validator.check,
        )
        out.print(
            f"[bold]{escape(base.name)}[/] on {base.device} in {base.dtype}: fingerprint "
            f"{base.manifest.fingerprint[:12]}, context {base.context_length} tokens"
        )
        server = _Server(app, settings, registry, out, started, with_key=bool(settings.api_keys or keys))
        # uvicorn passes a signal on to whoever handled it before; a graceful end is no failure.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: None)
        server.run()
    finally:
        validator.close()
        store.close()
        ledger.close()


def publish_folder(folder: Path, registry: Registry, quarantine: Path, out: Console) -> None:
    """Publish every `*.safetensors` of a folder; a file that is refused is reported and left out."""
    if not folder.is_dir():
        raise SwitchyardError(f"there is no folder {folder} to take expert files from")
    for file in sorted(folder.glob("*.safetensors")):
        with tempfile.NamedTemporaryFile(dir=quarantine, delete=False) as copy:
            path = Path(copy.name)
        try:
            shutil.copyfile(file, path)
            registry.publish(path)
        except SwitchyardError as error:
            out.print(f"[yellow]{escape(file.name)} is not served:[/] {escape(error.message)}")
        finally:
            path.unlink(missing_ok=True)


class _Server(uvicorn.Server):
    """uvicorn, with a last word at the end of the start-up."""

    def __init__(
        self, app: FastAPI, settings: Settings, registry: Registry, out: Console, started: float, *, with_key: bool
    ) -> None:
        config = uvicorn.Config(
            app,
            host=settings.host,
            port=settings.port,
            log_config=None,
            access_log=False,
            server_header=False,
            ws="none",
            timeout_graceful_shutdown=30,
        )
        super().__init__(config)
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
        self._out.print(f"[green]ready[/] after {time.monotonic() - self._began:.1f} s at http://{host}:{port}\n")
        for title, command in curl_lines(f"http://{host}:{port}", experts, self._registry, self._with_key):
            self._out.print(f"[dim]# {escape(title)}[/]")
            # Whole lines, whatever the width of the window: they are there to be copied.
            self._out.print(command, markup=False, highlight=False, soft_wrap=True)


def curl_lines(url: str, experts: Sequence[ExpertRecord], registry: Registry, with_key: bool) -> list[tuple[str, str]]:
    """Commands that show what the server does: `[(what, command)]`, with prompts from the experts' own exemplars."""
    taught = [record for record in experts if record.exemplar_count]
    lines: list[tuple[str, str, str]] = []
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
