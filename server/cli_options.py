"""One command-line option per setting and per option of compressing, made from their own names, types and
descriptions."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin

import typer
from pydantic import BaseModel, ByteSize, TypeAdapter, ValidationError

from server.api.compress_options import CompressOptions
from server.settings import Settings
from store.errors import SwitchyardError

_Model = TypeVar("_Model", bound=BaseModel)


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Give a Typer command that takes `settings: Settings` one option for every field of it.

    An option that is not given is left to the environment and to the default, which `Settings` knows.
    """
    own = inspect.signature(command, eval_str=True)
    fields = Settings.model_fields
    options = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_annotation(name))
        for name in fields
    ]
    rest = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own.parameters.values() if p.name != "settings"]

    @functools.wraps(command)
    def run(**given: Any) -> None:
        chosen = {name: given.pop(name) for name in fields}
        command(settings=_made(Settings, chosen), **given)

    run.__signature__ = own.replace(parameters=[*rest, *options])  # type: ignore[attr-defined]
    return run


def with_compression(of: str = "") -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a Typer command that takes `asked: CompressOptions` one option for every field of it, in its place.

    Args:
        of: what the options are for, where that is not all that the command takes: stands before the help of each.
    """

    def wrap(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command, eval_str=True)
        fields = CompressOptions.model_fields
        parameters: list[inspect.Parameter] = []
        for parameter in own.parameters.values():
            names = fields if parameter.name == "asked" else ()
            parameters += [_compressing(name, of) for name in names] or [parameter]

        @functools.wraps(command)
        def run(**given: Any) -> None:
            chosen = {name: given.pop(name) for name in fields}
            # What is as it would be anyhow does not count as given.
            chosen = {name: None if value == fields[name].default else value for name, value in chosen.items()}
            for name, (_, read) in _WRITTEN.items():
                chosen[name] = read(chosen[name]) if chosen[name] else None
            command(asked=_made(CompressOptions, chosen), **given)

        keyword = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
        run.__signature__ = own.replace(parameters=keyword)  # type: ignore[attr-defined]
        return run

    return wrap


def bytes_of(text: str) -> int:
    """A size such as 500KB.

    Raises:
        SwitchyardError: it is none.
    """
    try:
        return int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError:
        raise SwitchyardError(f"--max-size must be a size such as 500KB or 1MiB, not {text}") from None


def densities_of(given: Sequence[str]) -> dict[str, float]:
    """`GLOB=DENSITY` each.

    Raises:
        SwitchyardError: one is not.
    """
    densities: dict[str, float] = {}
    for text in given:
        glob, _, value = text.rpartition("=")
        try:
            densities[glob] = float(value)
        except ValueError:
            glob = ""
        if not glob:
            raise SwitchyardError(f"--tensor-density must be GLOB=DENSITY, not {text}")
    return densities


_WRITTEN: Mapping[str, tuple[Any, Callable[[Any], Any]]] = {
    "max_size": (str, bytes_of),
    "tensor_density": (list[str], densities_of),
}
"""Options of compressing that people write otherwise than JSON has them: as what, and how that is read."""
_HOW = {"max_size": " Such as 500KB or 1MB.", "tensor_density": " As 'GLOB=DENSITY'; may be repeated."}


def _made(model: type[_Model], chosen: Mapping[str, Any]) -> _Model:
    """A model of what was given.

    Raises:
        SwitchyardError: it is refused; the message names the option.
    """
    try:
        return model(**{name: value for name, value in chosen.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        field, *inner = map(str, first["loc"] or ("",))
        where = " ".join([f"--{field.replace('_', '-')}", *inner]) + ": " if field else ""
        raise SwitchyardError(where + first["msg"].removeprefix("Value error, ")) from None


def _compressing(name: str, of: str) -> inspect.Parameter:
    field = CompressOptions.model_fields[name]
    said = f"{field.description}{_HOW.get(name, '')}"
    text = f"{of}: {said[0].lower()}{said[1:]}" if of else said
    option = typer.Option(f"--{name.replace('_', '-')}", help=text)
    kind, *_ = get_args(field.annotation) or (field.annotation,)
    kind = get_args(kind)[0] if get_origin(kind) is Annotated else kind
    kind, _ = _WRITTEN.get(name, (kind, None))
    default = field.default or None
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind | None, option]
    )


def _annotation(name: str) -> Any:
    field = Settings.model_fields[name]
    kind = field.annotation
    option = typer.Option(help=field.description, envvar=f"SWITCHYARD_{name.upper()}", show_default=_default(name))
    if kind is bool:
        return Annotated[bool | None, option]
    if kind is Path:
        return Annotated[Path | None, option]
    # Numbers, sizes such as 2GiB and lists are parsed by `Settings`, which names what is wrong with them.
    return Annotated[str | None, option]


def _default(name: str) -> str | bool:
    field = Settings.model_fields[name]
    if field.is_required():
        return "required"
    if field.default_factory is not None:
        return str(field.get_default(call_default_factory=True)).replace(str(Path.home()), "~")
    if isinstance(field.default, frozenset) or field.default is None:
        return False
    return field.default.human_readable() if hasattr(field.default, "human_readable") else str(field.default)
