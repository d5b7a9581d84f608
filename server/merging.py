"""`switchyard merge`: several expert files as one, or one negated."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from server.engine.base_source import resolve_base
from server.settings import Settings
from store.card import Card
from store.checkpoint import open_checkpoint
from store.errors import InvalidRequestError
from store.fingerprint import manifest_of
from store.merge_methods import MergeSettings, Method
from store.merging import merge_experts


def merge_files(
    out: Console,
    base: str,
    experts: Sequence[str],
    output: Path,
    settings: MergeSettings,
    *,
    name: str | None,
    description: str,
    card: Card,
    cache_dir: Path | None,
) -> None:
    """Merge expert files, `FILE` or `FILE=WEIGHT`, and say what came out.

    Raises:
        SwitchyardError: as `merge_experts`, or a weight is no number.
    """
    cache = cache_dir or Settings.model_fields["cache_dir"].get_default(call_default_factory=True)
    sources = [_source(text) for text in experts]
    with out.status("merging") as status:
        folder = resolve_base(base, cache)

        def tell(done: int, total: int) -> None:
            status.update(f"merging: step {done} of {total}")

        header = merge_experts(
            sources, manifest_of(folder, cache), output, settings,
            name=name, description=description, card=card, weights=open_checkpoint(folder), progress=tell,
        )  # fmt: skip
    out.print(
        f"[bold]{escape(str(output))}[/]: {len(sources)} expert{'s' * (len(sources) > 1)} by {settings.method}, "
        f"{output.stat().st_size / 1e6:.2f} MB, {header.bits_per_param:.3f} bits per parameter"
    )
    if settings.method is Method.ATLAS:
        said = header.codec_params
        out.print(f"KL of the experts' answers: {said['kl']:.4f} nats/token, at the start {said['kl_at_start']:.4f}")


def _source(text: str) -> tuple[Path, float]:
    if Path(text).is_file():
        return Path(text), 1.0
    file, separator, weight = text.rpartition("=")
    try:
        return (Path(file), float(weight)) if separator else (Path(text), 1.0)
    except ValueError:
        raise InvalidRequestError(f"give FILE or FILE=WEIGHT, not {text}", param="experts") from None
