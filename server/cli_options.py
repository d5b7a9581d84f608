"""One command-line option per setting, made from the settings' own names, types and descriptions."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from server.settings import Settings
from store.errors import SwitchyardError


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
        try:
            settings = Settings(**{name: value for name, value in chosen.items() if value is not None})
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            flag = f"--{where.replace('_', '-')}: " if where else ""
            raise SwitchyardError(flag + first["msg"].removeprefix("Value error, ")) from None
        command(settings=settings, **given)

    run.__signature__ = own.replace(parameters=[*rest, *options])  # type: ignore[attr-defined]
    return run


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
