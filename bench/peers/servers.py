"""Every server as a process of its own, with the settings that a user would pick for two cores and 16 clients."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from bench.peers.replay import Peer
from bench.peers.trace import Asked
from bench.report import ROOT
from bench.served import serving_process
from examples.fetch import CACHE
from server.engine.options import BaseWeights

CLIENTS = 16
CONTEXT = 512
"""Tokens that peers keep room for, per client: enough for every prompt and answer of the trace."""
BLOCK = 32
"""Tokens of a block of transformers' cache."""
START_SECONDS = 180.0
DTYPE = "bfloat16"


class PeerError(RuntimeError):
    """A peer cannot run here, or did not start."""


@dataclass(frozen=True)
class Subject:
    """What all servers serve: one base, and fine-tunes of it by name."""

    base: Path
    gguf: Path
    experts: Mapping[str, Path]
    tuned: Mapping[str, Path]
    adapters: Mapping[str, Path]


def chat(asked: Asked, model: str) -> dict[str, Any]:
    """What all servers are asked: greedy, as long as the trace says."""
    messages = [{"role": "user", "content": asked.prompt}]
    return {"model": model, "messages": messages, "temperature": 0, "max_tokens": asked.max_tokens}


@contextmanager
def ours(subject: Subject, weights: BaseWeights) -> Iterator[Peer]:
    """`switchyard serve` with the experts; a quantised base takes mixed mode."""
    with tempfile.TemporaryDirectory() as scratch:
        experts = Path(scratch, "experts")
        experts.mkdir()
        for name, file in subject.experts.items():
            shutil.copyfile(file, experts / f"{name}.safetensors")
        options = ["--base", subject.base, "--base-name", "base", "--experts", experts, "--dtype", DTYPE]
        options += ["--data-dir", Path(scratch, "data"), "--cache-dir", CACHE.parent, "--threads", os.cpu_count() or 1]
        if weights is not BaseWeights.FULL:
            options += ["--base-weights", weights.value, "--mode", "mixed"]
        with serving_process(*map(str, options)) as (url, pid):
            name = f"switchyard, {DTYPE if weights is BaseWeights.FULL else weights.value}"
            yield Peer(name, url, pid, lambda one: chat(one, one.expert or "base") | {"ignore_eos": not one.natural})


@contextmanager
def peft(subject: Subject, python: str | Path, mixed: bool, dtype: str = DTYPE) -> Iterator[Peer]:
    """transformers and PEFT behind FastAPI: `bench.peers.peft_server`."""
    port = free_port()
    command = [str(python), "-m", "bench.peers.peft_server", "--base", str(subject.base), "--port", str(port)]
    command += ["--dtype", dtype, "--max-batch", str(CLIENTS), *(["--mixed"] if mixed else [])]
    for name, folder in subject.adapters.items():
        command += ["--adapter", f"{name}={folder}"]
    name = f"transformers + PEFT, {'adapters mixed in a batch' if mixed else 'an adapter at a time'}"
    with started(name, command, port) as (url, pid):
        yield Peer(name, url, pid, lambda one: chat(one, one.expert or "base") | {"ignore_eos": not one.natural})


@contextmanager
def transformers_serve(subject: Subject, python: Path, batching: bool, dtype: str = DTYPE) -> Iterator[Peer]:
    """`transformers serve`, which loads the fine-tunes' folders as they are asked for and keeps them in memory.

    Args:
        batching: with its continuous batching, which takes requests of one model at a time.
    """
    port = free_port()
    command = [str(python.with_name("transformers")), "serve", "--port", str(port), "--dtype", dtype]
    command += ["--device", "cpu"]
    if batching:
        # Every model has a cache of its own, and by default one of all memory that is free.
        blocks = str(CLIENTS * CONTEXT // BLOCK)
        command += ["--continuous-batching", "--cb-block-size", str(BLOCK), "--cb-num-blocks", blocks]
        command += ["--cb-max-batch-tokens", str(CONTEXT)]

    def body(one: Asked) -> dict[str, Any]:
        folder = subject.tuned[one.expert] if one.expert else subject.base
        exact = {"do_sample": False, "min_new_tokens": one.max_tokens, "max_new_tokens": one.max_tokens}
        more = {} if one.natural else {"generation_config": json.dumps(exact)}
        return chat(one, str(folder.resolve())) | more

    name = f"transformers serve, {'batching continuously' if batching else 'a request at a time'}"
    with started(name, command, port) as (url, pid):
        yield Peer(name, url, pid, body)


@contextmanager
def llama(subject: Subject, server: Path, adapters: Mapping[str, Path]) -> Iterator[Peer]:
    """llama.cpp's server over the four-bit base, a slot for every client, adapters named by each request.

    Args:
        server: its program.
        adapters: of each expert, in its own format.
    """
    port, cores = free_port(), str(os.cpu_count() or 1)
    command = [str(server), "-m", str(subject.gguf), "--port", str(port), "--threads", cores, "--threads-batch", cores]
    command += ["--parallel", str(CLIENTS), "--ctx-size", str(CLIENTS * CONTEXT), "--jinja", "--no-webui"]
    command += ["--lora", ",".join(map(str, adapters.values())), "--lora-init-without-apply"]
    places = {name: place for place, name in enumerate(adapters)}

    def body(one: Asked) -> dict[str, Any]:
        chosen = [{"id": places[one.expert], "scale": 1.0}] if one.expert else []
        return chat(one, "base") | {"lora": chosen, "ignore_eos": not one.natural}

    with started("llama.cpp", command, port) as (url, pid):
        yield Peer("llama.cpp", url, pid, body)


@contextmanager
def started(name: str, command: Sequence[str], port: int) -> Iterator[tuple[str, int]]:
    """Run a server until it answers `/health`; yields its address and the process's id.

    Raises:
        PeerError: it ended, or did not answer in three minutes; the message ends with what it said last.
    """
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            if not _answers(process, url):
                log.seek(0)
                raise PeerError(f"{name} did not start: …{log.read()[-400:]}")
            yield url, process.pid
        finally:
            process.terminate()
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _answers(process: subprocess.Popen[bytes], url: str) -> bool:
    until = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < until:
        try:
            if httpx.get(f"{url}/health", timeout=5, trust_env=False).is_success:
                return True
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    return False


def free_port() -> int:
    """A port of the loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def resident_bytes(pid: int) -> int:
    """Memory that a process holds, with its children, shared pages counted in each."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    own = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS:")) << 10
    return own + sum(resident_bytes(int(child)) for child in children)
