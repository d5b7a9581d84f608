"""What the pages speak of, small: a base, a fine-tune of it, prompts, and experts with the names of the demo's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.store.builders import document_of, with_document
from tests.tiny import save_base, save_tuned
from tests.zygote import Zygote, clean_environment

EXPERTS = ("cron", "num_es", "num_fr")
PROMPTS = ('What is the cron schedule for "Every {} minutes"?', "Write the number {} in Spanish words.")


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory, zygote: Zygote) -> Path:
    """A folder with `llama`, `llama-sql`, `prompts.jsonl` and `examples/experts`."""
    folder = tmp_path_factory.mktemp("docs")
    save_base(folder / "llama")
    save_tuned(folder / "llama", folder / "llama-sql")
    (folder / "examples/experts").mkdir(parents=True)
    prompts = [form.format(i) for i in range(15) for form in PROMPTS]
    write_prompts(folder / "prompts.jsonl", prompts)
    argv = ("switchyard", "compress", "--base", "llama", "--tuned", "llama-sql", "--knob", "l1", "--out", "expert",
            "--exemplars", "prompts.jsonl")  # fmt: skip
    compressing = zygote.start(argv, cwd=folder, env=clean_environment())
    said = compressing.stdout.read()
    assert compressing.wait(120) == 0, said
    for name in EXPERTS:  # they need not differ: what is looked at is whether commands work
        data = (folder / "expert").read_bytes()
        renamed = with_document(data, document_of(data) | {"name": name})
        (folder / f"examples/experts/{name}.safetensors").write_bytes(renamed)
    (folder / "expert").unlink()
    write_prompts(folder / "prompts.jsonl", [f"How many orders were placed in week {i}?" for i in range(30)])
    (folder / ".venv/bin").mkdir(parents=True)
    (folder / ".venv/bin/activate").write_text("")
    return folder


def write_prompts(path: Path, prompts: list[str]) -> None:
    path.write_text("".join(f"{json.dumps({'prompt': prompt})}\n" for prompt in prompts), encoding="utf-8")


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compiled kernels and the like, for the servers of all pages."""
    return tmp_path_factory.mktemp("docs-cache")
