"""All checks of one client: in a process of its own, behind a fence, with a time limit."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from bench.clients import fence, node
from bench.clients.target import Target

ROOT = Path(__file__).parents[2]
SECONDS = 600.0

CLIENTS = {
    "openai (Python)": "with_openai",
    "openai (Node)": "node",
    "LangChain": "with_langchain",
    "LiteLLM": "with_litellm",
    "lm-eval": "with_lm_eval",
}
"""Client → the module that checks it."""

PACKAGES = {"with_openai": "openai", "with_langchain": "langchain-openai", "with_litellm": "litellm"}
PACKAGES["with_lm_eval"] = "lm-eval"


class ClientError(Exception):
    """A client's checks did not come to an end."""


def version_of(client: str) -> str:
    """The client's version, as it is installed."""
    module = CLIENTS[client]
    return node.version() if module == "node" else version(PACKAGES[module])


def check(client: str, target: Target, only: Sequence[str] = ()) -> dict[str, str | None]:
    """Feature → what went wrong with it, or None; features that the client does not offer are not there.

    Raises:
        ClientError: the checks did not come to an end; the message tells what was printed.
        MissingPackageError: the client is not installed.
    """
    module = CLIENTS[client]
    if module == "node":
        command = node.command(target, only)
    else:
        command = [sys.executable, "-m", "bench.clients.worker", module, target.to_json(), *only]
    environment = fence.environment(
        PYTHONPATH=str(ROOT), OPENAI_API_KEY=target.key, HOME=target.folder, HF_HOME=f"{target.folder}/hf"
    )
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False
    )
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"feature":')]
    if done.returncode or not lines:
        raise ClientError(
            f"{client} ended with status {done.returncode}:\n{done.stdout[-1000:]}\n{done.stderr[-4000:]}"
        )
    return {line["feature"]: line["error"] for line in lines}
