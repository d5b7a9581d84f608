"""Make a server's rooms from its settings: base, store, registry, router and engine, behind one HTTP application."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from fastapi import FastAPI
from rich.console import Console
from rich.markup import escape
from transformers.utils.logging import disable_progress_bar

from router.background import background_key
from router.features import FeatureCache
from router.router import Router
from router.state import StateFile
from server.app import create_app
from server.engine.base_source import resolve_base
from server.engine.engine import TransformersEngine
from server.engine.options import BaseWeights
from server.exposure import check_exposure
from server.generation import AUTO
from server.settings import Settings
from store.backends.opening import open_ledger, open_store
from store.errors import SwitchyardError
from store.fingerprint import manifest_of
from store.keys import Keys
from store.registry import Registry
from store.signature import read_beside
from store.trust import Trust, trusted_keys
from store.validation import Validator


@dataclass(frozen=True)
class Assembled:
    """A server that only wants to be run: whoever serves `app` runs its lifespan."""

    app: FastAPI
    engine: TransformersEngine
    registry: Registry
    has_keys: bool
    """Whether requests need an API key."""


@contextmanager
def assembled(settings: Settings, out: Console, *, preload: Path | None = None) -> Iterator[Assembled]:
    """Everything that a server consists of, but who listens; closed afterwards.

    Args:
        out: where it says what it is doing.
        preload: a folder of expert files to publish first, where they are not there yet.

    Raises:
        SwitchyardError: the base, the store or a setting is unusable.
    """
    disable_progress_bar()  # type: ignore[no-untyped-call]
    address = settings.store or str(settings.data_dir)
    with ExitStack() as opened:
        ledger = open_ledger(address)
        opened.callback(ledger.close)
        keys = Keys(ledger)
        check_exposure(settings, keys, out)
        trust = Trust(trusted_keys(settings.trusted_keys), required=settings.require_signature)
        with out.status(f"preparing the base {escape(settings.base)} (a GGUF file is converted once)"):
            folder = resolve_base(settings.base, settings.cache_dir)
            manifest = manifest_of(folder, settings.cache_dir)
        store = open_store(address, cache=settings.cache_dir / "store", cache_bytes=settings.store_cache_bytes)
        opened.callback(store.close)
        validator = Validator(manifest)
        opened.callback(validator.close)
        validator.start()
        registry = Registry(store, manifest, reserved=frozenset({AUTO, settings.served_base_name}), trust=trust)
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
        app = create_app(
            settings,
            engine=engine,
            registry=registry,
            ledger=ledger,
            router=_router(settings, engine),
            quarantine=store.quarantine(),
            check=validator.check,
            base_folder=folder,
        )
        out.print(
            f"[bold]{escape(base.name)}[/] on {base.device} in {base.dtype}: fingerprint "
            f"{base.manifest.fingerprint[:12]}, context {base.context_length} tokens"
        )
        yield Assembled(app, engine, registry, has_keys=bool(settings.api_keys or keys))


def _router(settings: Settings, engine: TransformersEngine) -> Router:
    base = engine.base
    kept = base.dtype if settings.base_weights is BaseWeights.FULL else f"{base.dtype}, {settings.base_weights}"
    variant = f"{kept}, {settings.feature_tokens} tokens"
    fingerprint, layer = base.manifest.fingerprint, base.feature_layer
    features = FeatureCache(settings.cache_dir / "features", fingerprint, layer, variant=variant)
    given = settings.router()
    # Whatever a metric is fitted to, but for the experts, which it names itself.
    space = f"{fingerprint} {layer} {variant} {given.of_metric} {background_key()}"
    state = StateFile(settings.data_dir / "router" / "metric", space)
    return Router(engine.features, features, given, state, engine.base.device)


def publish_folder(folder: Path, registry: Registry, quarantine: Path, out: Console) -> None:
    """Publish every `*.safetensors` of a folder; a file that is refused is reported and left out."""
    if not folder.is_dir():
        raise SwitchyardError(f"there is no folder {folder} to take expert files from")
    for file in sorted(folder.glob("*.safetensors")):
        with tempfile.NamedTemporaryFile(dir=quarantine, delete=False) as copy:
            path = Path(copy.name)
        try:
            shutil.copyfile(file, path)
            registry.publish(path, signature=read_beside(file))
        except SwitchyardError as error:
            out.print(f"[yellow]{escape(file.name)} is not served:[/] {escape(error.message)}")
        finally:
            path.unlink(missing_ok=True)
