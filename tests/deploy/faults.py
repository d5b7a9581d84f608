"""Faults that several checks look for: settings, verbs and options that there are not."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from deploy.tables import cli_commands
from server.settings import Settings
from tests.deploy.project import Instruction, Project, Yaml

PREFIX = "SWITCHYARD_"
CLIENT_VARIABLES = {"SWITCHYARD_SERVER", "SWITCHYARD_API_KEY"}
"""Not settings of the server: the command line's own."""

SECRET = re.compile(r"KEY|TOKEN|PASSWORD|SECRET", re.IGNORECASE)
_PLACEHOLDERS = {"VERB", "TARGET"}


def services(project: Project) -> Iterator[tuple[str, Yaml]]:
    yield from project.compose["services"].items()


def last(project: Project, name: str) -> Instruction:
    """The instruction that counts: the last of its kind in the image's stage."""
    return (project.instructions(name, project.final_stage) or [Instruction("", name, "missing")])[-1]


def unknown_settings(names: Iterator[str] | Sequence[str] | set[str] | dict[str, str], where: str) -> Iterator[str]:
    for name in names:
        is_ours = name.startswith(PREFIX) and name not in CLIENT_VARIABLES
        if is_ours and name.removeprefix(PREFIX).lower() not in Settings.model_fields:
            yield f"{where}: there is no setting {name}"


def verb_faults(argv: Sequence[str], where: str) -> Iterator[str]:
    """What is wrong with the arguments of a call of `switchyard`."""
    if not argv or argv[0] in _PLACEHOLDERS or argv[0].startswith("-"):
        return
    commands = cli_commands()
    if argv[0] not in commands:
        yield f"{where}: there is no verb {argv[0]}"
        return
    verb, argv = commands[argv[0]], list(argv)
    # Not isinstance: Typer brings a click of its own.
    while len(argv) > 1 and argv[1] in (below := getattr(verb, "commands", {})):
        verb, argv = below[argv[1]], [f"{argv[0]} {argv[1]}", *argv[2:]]
    options = {option for parameter in verb.params for option in parameter.opts} | {"--help"}
    for word in argv[1:]:
        if word.startswith("-") and word.split("=")[0] not in options:
            yield f"{where}: `switchyard {argv[0]}` has no option {word}"
