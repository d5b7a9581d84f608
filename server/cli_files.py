"""The verbs of `switchyard` that make expert files and look at them; they need no server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from server.api.compress_options import CompressOptions
from server.cli_options import with_compression
from store.card import Card, check_card
from store.errors import InvalidRequestError
from store.expert_file import digest_of
from store.merge_methods import MergeSettings, Method
from store.signature import fingerprint
from store.strict_json import FieldError

files = typer.Typer()
out = Console()

Author = Annotated[str, typer.Option(help="Who made it.")]
License = Annotated[str, typer.Option(help="Its licence, as an SPDX expression: Apache-2.0.")]
Tags = Annotated[list[str] | None, typer.Option("--tag", help="What it can be found by; may be repeated.")]
Parents = Annotated[
    list[str] | None,
    typer.Option("--parent", help="An expert it was made from: a file, or its digest; may be repeated."),
]
Meta = Annotated[list[str] | None, typer.Option("--meta", help="Anything else: KEY=VALUE; may be repeated.")]
CacheDir = Annotated[Path | None, typer.Option(envvar="SWITCHYARD_CACHE_DIR", help="Where a converted base is kept.")]


@files.command()
@with_compression()
def compress(
    base: Annotated[str, typer.Option(help="The base model: a checkpoint folder, a GGUF file or a hub id.")],
    tuned: Annotated[Path, typer.Option(help="The fine-tune: a checkpoint folder (safetensors), or a PEFT adapter's.")],
    output: Annotated[Path, typer.Option("--out", "-o", help="The expert file to write.")],
    asked: CompressOptions,
    exemplars: Annotated[
        Path | None, typer.Option(help="JSONL of prompts the expert is for; calibrates the knob, and routes.")
    ] = None,
    labelled: Annotated[
        Path | None,
        typer.Option(help="JSONL of prompts with their answers: the report tells how much of the gain is kept."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="What the expert would like to be called.")] = None,
    description: Annotated[str, typer.Option(help="One line for people.")] = "",
    author: Author = "",
    license: License = "",
    tag: Tags = None,
    parent: Parents = None,
    meta: Meta = None,
    relative_to: Annotated[
        list[Path] | None,
        typer.Option(
            help="The expert file that the fine-tune started from: the new expert stands on it. What that one stands "
            "on, too, comes after it."
        ),
    ] = None,
    cache_dir: CacheDir = None,
) -> None:
    """Compress a fine-tune of the base, full or an adapter, into an expert file, and report what it costs."""
    from server.compressing import compress_with_progress

    asked.check(exemplars=exemplars is not None, labelled=labelled is not None, stands=bool(relative_to))
    compress_with_progress(
        out, base, tuned, output, cache_dir=cache_dir, exemplars=exemplars, labelled=labelled, name=name,
        description=description, card=card_of(author, license, tag, parent, meta), relative_to=relative_to or (),
        **asked.given(),
    )  # fmt: skip


@files.command()
def merge(
    experts: Annotated[list[str], typer.Argument(help="Expert files of one base: FILE, or FILE=WEIGHT.")],
    base: Annotated[str, typer.Option(help="The base they were made for.")],
    output: Annotated[Path, typer.Option("--out", "-o", help="The expert file to write.")],
    method: Annotated[Method, typer.Option(help="How their deltas become one.")] = Method.TIES,
    strength: Annotated[
        float | None, typer.Option(help="Multiplier of the result; default: 0.3 for sums of two or more, else 1.")
    ] = None,
    drop: Annotated[float, typer.Option(help="Share of the entries that dare drops.")] = 0.5,
    dominant: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of the singular values that opcm keeps newcomers out of.")
    ] = 0.5,
    two_sided: Annotated[
        bool, typer.Option("--two-sided", help="Of opcm: keep them out of whole rows and columns, as the paper has it.")
    ] = False,
    shots: Annotated[
        int, typer.Option(min=1, help="Exemplars of each expert, from its file, that atlas learns from.")
    ] = 16,
    name: Annotated[str | None, typer.Option(help="What the result would like to be called.")] = None,
    description: Annotated[str, typer.Option(help="One line for people.")] = "",
    author: Author = "",
    license: License = "",
    tag: Tags = None,
    meta: Meta = None,
    cache_dir: CacheDir = None,
) -> None:
    """Merge experts into one, or negate one, offline.

    A negative weight takes a skill away (negation, unlearning); task-arithmetic also takes one file: FILE=-1.
    """
    from server.merging import merge_files

    settings = MergeSettings(
        method=method, strength=strength, drop=drop, dominant=dominant, two_sided=two_sided, shots=shots
    )
    card = card_of(author, license, tag, None, meta)
    merge_files(
        out, base, experts, output, settings, name=name, description=description, card=card, cache_dir=cache_dir
    )


@files.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="An expert file.")],
    trusted_keys: Annotated[
        str, typer.Option(envvar="SWITCHYARD_TRUSTED_KEYS", help="Whose signatures count, as the server has them.")
    ] = "",
    plot: Annotated[
        Path | None, typer.Option(help="Draw density and bits by layer and module: a PNG. Needs matplotlib.")
    ] = None,
) -> None:
    """Show what is in an expert file and who signed it, without loading any model."""
    from server.inspecting import show_expert

    show_expert(file, out, trusted_keys)
    if plot is not None:
        from server.plotting import plot_expert

        plot_expert(file, plot)
        out.print(f"drawn in [bold]{escape(str(plot))}[/]")


@files.command()
def keygen(
    file: Annotated[Path, typer.Argument(help="Where the private key goes; the public one goes to FILE.pub.")],
    name: Annotated[str, typer.Option(help="Whose it is: servers that trust it show this.")] = "",
) -> None:
    """Make an ed25519 key to sign experts with. One that ssh-keygen has made will do as well."""
    from server.signing import make_key

    line = make_key(file, name)
    out.print(f"[bold]{escape(str(file))}[/] signs; servers trust it by SWITCHYARD_TRUSTED_KEYS=")
    out.print(line, markup=False, highlight=False, soft_wrap=True)


@files.command()
def sign(
    file: Annotated[Path, typer.Argument(help="An expert file.")],
    key: Annotated[Path, typer.Option(help="A private ed25519 key, of keygen or ssh-keygen.")],
) -> None:
    """Sign an expert file: writes FILE.sig, which push sends along."""
    from server.signing import sign_file

    beside, signature = sign_file(file, key, lambda: str(typer.prompt("passphrase of the key", hide_input=True)))
    out.print(f"[bold]{escape(str(beside))}[/]: signed with {fingerprint(signature.key)}")


def card_of(
    author: str, license: str, tags: list[str] | None, parents: list[str] | None, metadata: list[str] | None
) -> Card:
    """What the options say about an expert.

    Raises:
        InvalidRequestError: an option breaks a rule of the format.
    """
    given = parents or []
    digests = tuple(digest_of(Path(parent)) if Path(parent).is_file() else parent for parent in given)
    card = Card(author, license, tuple(tags or ()), digests, metadata_of(metadata or []))
    try:
        check_card(card)
    except FieldError as error:
        raise InvalidRequestError(f"{error.field} {error.message}", param=error.field) from None
    return card


def metadata_of(given: list[str]) -> dict[str, str]:
    """`KEY=VALUE` each.

    Raises:
        InvalidRequestError: one has no `=`, or a key is there twice.
    """
    found: dict[str, str] = {}
    for text in given:
        key, separator, value = text.partition("=")
        if not separator:
            raise InvalidRequestError(f"--meta must be KEY=VALUE, not {text}", param="meta")
        if key in found:
            raise InvalidRequestError(f"--meta gives {key} twice", param="meta")
        found[key] = value
    return found
