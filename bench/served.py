"""A Switchyard server as its own process, and questions to it: what the benchmarks measure through."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import httpx

CONCURRENCY = 16


@dataclass(frozen=True)
class Answer:
    """What came back for one prompt: the text, and the mix as the response header names it."""

    text: str
    mix: str


@contextmanager
def serving(*arguments: str | Path) -> Iterator[str]:
    """Run `switchyard serve` on a free port; yields its address."""
    with serving_process(*arguments) as (address, _):
        yield address


@contextmanager
def serving_process(*arguments: str | Path, log: Path | None = None) -> Iterator[tuple[str, int]]:
    """`serving`; yields the address and the process's id.

    Args:
        log: where to keep all that the server says; else it is dropped once it is ready.
    """
    command = [sys.executable, "-m", "server.cli", "serve", "--port", "0", *map(str, arguments)]
    environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE", "NO_COLOR": "1", "COLUMNS": "200"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        yield _address(process, log), process.pid
    finally:
        process.terminate()
        process.wait(timeout=60)


def _address(process: subprocess.Popen[str], log: Path | None) -> str:
    assert process.stdout is not None
    screen = ""
    for line in process.stdout:
        screen += line
        if found := re.search(r"ready after .* at (http://\S+)", line):
            # The pipe must not fill up while the server talks on.
            threading.Thread(target=_keep, args=(process.stdout, log), daemon=True).start()
            return found.group(1)
    raise RuntimeError(f"the server did not start:\n{screen}")


def _keep(output: IO[str], log: Path | None) -> None:
    with Path(log or os.devnull).open("w", encoding="utf-8") as file:
        for line in output:
            file.write(line)
            file.flush()


def ask(url: str, model: str, prompts: Sequence[str], max_tokens: int) -> list[Answer]:
    """Greedy chat answers to every prompt, `CONCURRENCY` at a time, in order."""
    with httpx.Client(base_url=url, timeout=600) as http, ThreadPoolExecutor(CONCURRENCY) as pool:

        def one(prompt: str) -> Answer:
            body: dict[str, Any] = {
                "model": model,
                "messages": [{"role": "user", "content": prompt}],
                "temperature": 0,
                "max_tokens": max_tokens,
            }
            response = http.post("/v1/chat/completions", json=body).raise_for_status()
            text: str = response.json()["choices"][0]["message"]["content"]
            return Answer(text, response.headers["x-switchyard-mix"])

        return list(pool.map(one, prompts))


def routes(url: str, prompts: Sequence[str]) -> list[list[str]]:
    """The experts that `model: auto` would choose for every prompt; empty lists mean the base."""
    with httpx.Client(base_url=url, timeout=600) as http, ThreadPoolExecutor(CONCURRENCY) as pool:

        def one(prompt: str) -> list[str]:
            mix = http.post("/v1/route", json={"prompt": prompt}).raise_for_status().json()["mix"]
            return [part["id"] for part in mix]

        return list(pool.map(one, prompts))
