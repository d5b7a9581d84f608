"""The deployment's own files, read into shapes that can be checked. No Docker engine is asked."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

Yaml = dict[str, Any]

_VARIABLE = re.compile(r"\$\{(\w+)(?::([-?])([^}]*))?}")
_DOCUMENTS = ("README.md", "CONTRIBUTING.md", "docs/**/*.md", "examples/README.md")


@dataclass(frozen=True)
class Instruction:
    """One instruction of a Dockerfile: `stage` is the name of the stage it stands in, "" before the first."""

    stage: str
    name: str
    value: str

    @property
    def argv(self) -> list[str]:
        """The value of an instruction in exec form; ["sh", "-c", ...] for one in shell form."""
        if self.value.startswith("["):
            argv: list[str] = json.loads(self.value)
            return argv
        return ["sh", "-c", self.value]

    @property
    def words(self) -> list[str]:
        """The value split as a shell does, without options such as --from=build."""
        return [word for word in shlex.split(self.value) if not word.startswith("--")]

    def option(self, name: str) -> str | None:
        """The value of an option such as --from."""
        found = re.search(rf"(?:^|\s)--{name}=(\S+)", self.value)
        return found[1] if found else None


@dataclass(frozen=True)
class Project:
    """A checkout, or a part of one."""

    root: Path

    def text(self, name: str) -> str:
        return (self.root / name).read_text(encoding="utf-8")

    @cached_property
    def scripts(self) -> dict[str, str]:
        """Commands that installing the project makes."""
        scripts: dict[str, str] = tomllib.loads(self.text("pyproject.toml"))["project"]["scripts"]
        return scripts

    @cached_property
    def dockerfile(self) -> list[Instruction]:
        text = re.sub(r"^\s*#.*\n", "", self.text("Dockerfile"), flags=re.MULTILINE)
        stage, found = "", []
        for line in re.sub(r"\\\n", " ", text).splitlines():
            if not line.strip():
                continue
            name, _, value = line.strip().partition(" ")
            if name == "FROM":
                stage = value.split(" AS ")[1] if " AS " in value else value
            found.append(Instruction(stage, name, " ".join(value.split())))
        return found

    def instructions(self, name: str, stage: str | None = None) -> list[Instruction]:
        return [i for i in self.dockerfile if i.name == name and stage in (None, i.stage)]

    @cached_property
    def final_stage(self) -> str:
        return self.dockerfile[-1].stage

    @cached_property
    def image_env(self) -> dict[str, str]:
        """What the image sets in the environment of the server."""
        words = [word for i in self.instructions("ENV", self.final_stage) for word in i.words]
        return dict(word.split("=", 1) for word in words)

    @cached_property
    def compose(self) -> Yaml:
        """docker-compose.yml with every variable at its default."""
        parsed: Yaml = _expanded(yaml.safe_load(self.text("docker-compose.yml")))
        return parsed

    @cached_property
    def compose_variables(self) -> dict[str, str]:
        """Variables that docker-compose.yml asks of the host, and the operator behind each: "-", "?" or ""."""
        text = re.sub(r"^ *#.*", "", self.text("docker-compose.yml"), flags=re.MULTILINE)
        return {name: kind for name, kind, _ in _VARIABLE.findall(text)}

    @cached_property
    def env_example(self) -> dict[str, str]:
        lines = (line for line in self.text(".env.example").splitlines() if line and not line.startswith("#"))
        return dict(line.split("=", 1) for line in lines)

    @cached_property
    def make_targets(self) -> set[str]:
        return set(re.findall(r"^([a-z]+):", self.text("Makefile"), flags=re.MULTILINE))

    @property
    def documents(self) -> dict[str, str]:
        """The pages that people read, by path."""
        paths = [path for pattern in _DOCUMENTS for path in sorted(self.root.glob(pattern))]
        return {str(path.relative_to(self.root)): path.read_text(encoding="utf-8") for path in paths}

    def is_sent_to_build(self, path: str) -> bool:
        """Whether .dockerignore lets a path into the build: the last pattern that matches it decides."""
        sent = True
        for line in self.text(".dockerignore").splitlines():
            pattern = line.strip()
            if pattern and not pattern.startswith("#"):
                shown = pattern.removeprefix("!")
                if shown == "*" or path == shown or path.startswith(f"{shown}/"):
                    sent = pattern.startswith("!")
        return sent


def _expanded(node: Any) -> Any:
    """A parsed compose file with its variables replaced, as compose does it: after parsing, within strings."""
    if isinstance(node, dict):
        return {key: _expanded(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_expanded(value) for value in node]
    return _VARIABLE.sub(_default, node) if isinstance(node, str) else node


def _default(variable: re.Match[str]) -> str:
    return (variable[3] or "") if variable[2] == "-" else "given"
