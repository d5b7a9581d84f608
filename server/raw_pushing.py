"""`switchyard push FOLDER`: a raw fine-tune, a checkpoint's or an adapter's folder, which the server compresses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from server.api.compress_options import CompressOptions
from server.client import Client, Json, ServerError
from server.compress_report import remarks
from server.pushing import upload_file
from store.errors import SwitchyardError
from store.exemplars import parse_exemplars
from store.labelled import parse_labelled

_BESIDE = ("model.safetensors.index.json", "adapter_config.json")


def push_folder(
    client: Client,
    out: Console,
    folder: Path,
    asked: CompressOptions,
    *,
    exemplars: Path | None,
    labelled: Path | None = None,
    relative_to: str | None = None,
    **said: Any,
) -> Json:
    """Upload a fine-tune and have the server compress and publish it. Returns the job; Ctrl-C cancels it.

    Args:
        asked: how it is to be compressed.
        exemplars: JSON lines of prompts.
        labelled: JSON lines of prompts with their answers.
        relative_to: the server's expert that the fine-tune started from.
        said: further fields of the job: name, replace, ...

    Raises:
        InvalidRequestError: the options do not go together; nothing has been sent.
        ServerError: the server refused, or the job has failed.
        SwitchyardError: there is no fine-tune in the folder, or a file cannot be read.
    """
    asked.check(exemplars=exemplars is not None, labelled=labelled is not None, stands=relative_to is not None)
    try:
        prompts = None if exemplars is None else parse_exemplars(exemplars.read_bytes())
        rows = None if labelled is None else [vars(row) for row in parse_labelled(labelled.read_bytes())]
        uploads = [upload_file(client, out, file) for file in files_of(folder)]
    except OSError as error:
        raise SwitchyardError(f"cannot read {error.filename or folder}: {error.strerror}") from None
    body = {"uploads": uploads, "exemplars": prompts, "labelled": rows, "relative_to": relative_to}
    return _follow(client, out, client.create_job(body | asked.given() | said))


def outcome(job: Json) -> Iterator[str]:
    """What came of a job that succeeded, line by line, in rich's markup."""
    made, cost = job["expert"], job["report"]
    yield (
        f"[bold]{escape(made['id'])}[/] is live ({cost['bytes']:,} bytes, {cost['bits_per_param']:.3f} bits per "
        f"parameter, relative error {cost['relative_error']:.3f}, digest {made['digest'][:12]})"
    )
    yield from remarks(cost)


def files_of(folder: Path) -> list[Path]:
    """The files of a fine-tune: its weights, and what orders or explains them.

    Raises:
        SwitchyardError: there are no safetensors.
    """
    adapter = folder / "adapter_model.safetensors"
    weights = [adapter] if adapter.is_file() else sorted(folder.glob("*.safetensors"))
    if not weights:
        raise SwitchyardError(f"{folder} holds no safetensors file: it is no checkpoint and no adapter")
    return [*(folder / name for name in _BESIDE if (folder / name).is_file()), *weights]


def _follow(client: Client, out: Console, begun: Json) -> Json:
    job = begun
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn()
    try:
        with Progress(*columns, console=out) as bars:
            bar = bars.add_task("waiting for its turn", total=None)
            for job in client.watch_job(begun["id"]):
                if (progress := job["progress"]) is not None:
                    bars.update(bar, description=progress["stage"], total=progress["total"], completed=progress["done"])
    except KeyboardInterrupt:
        client.cancel_job(begun["id"])
        raise
    if job["status"] != "succeeded":
        message = job["error"]["message"] if job["error"] else f"the job was {job['status']}"
        raise ServerError(message, code="job_failed")
    return job
