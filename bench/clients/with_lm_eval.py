"""lm-evaluation-harness: `local-completions` and `local-chat-completions`, with the tasks of `examples/lm_eval`."""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import lm_eval
import requests
from lm_eval.tasks import TaskManager

from bench.clients.example import aimed, block
from bench.clients.target import Target, raised

ROOT = Path(__file__).parents[2]
TASKS = ROOT / "examples" / "lm_eval"
LIMIT = 4
TOLERANCE = 1e-3
"""Between the server and transformers, in nats per answer."""


def _evaluate(target: Target, task: str, kind: str = "local-completions", **how: Any) -> Any:
    path = "chat/completions" if "chat" in kind else "completions"
    options = {"gen_kwargs": how.pop("gen_kwargs")} if "gen_kwargs" in how else {}
    given: dict[str, Any] = {
        "base_url": f"{target.v1}/{path}",
        "model": target.base,
        "auth_token": target.key,
        "max_length": target.context,
        "max_retries": 1,
    }
    return _run(task, kind, given | how, apply_chat_template="chat" in kind, **options)


def _run(task: str, model: str, arguments: dict[str, Any], **how: Any) -> Any:
    tasks = TaskManager(include_path=str(TASKS), include_defaults=False)
    return lm_eval.simple_evaluate(
        model=model, model_args=arguments, tasks=[task], task_manager=tasks, limit=LIMIT, bootstrap_iters=0, **how
    )


def _likelihoods(found: Any) -> list[float]:
    """Of every choice of every question."""
    return [float(answer[0][0]) for sample in found["samples"]["numerals"] for answer in sample["resps"]]


def _written(found: Any) -> list[str]:
    return [sample["resps"][0][0] for sample in found["samples"]["numerals_written"]]


def example(target: Target) -> None:
    code = aimed(block("lm-evaluation-harness", "sh"), target)
    fenced = f"{sys.executable} -m bench.clients.fence lm_eval "
    script = code.replace("lm_eval run ", f"{fenced}run ")
    assert fenced in script
    done = subprocess.run(["sh", "-ec", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "|numerals" in done.stdout, done.stdout


@cache
def _of_texts(target: Target) -> list[float]:
    return _likelihoods(_evaluate(target, "numerals", tokenized_requests=False))


def echo(target: Target) -> None:
    found = _of_texts(target)
    assert len(found) == LIMIT * 4
    assert all(value < 0 for value in found)
    if target.base_folder:
        reference = _run("numerals", "hf", {"pretrained": target.base_folder, "device": "cpu", "dtype": "float32"})
        right = _likelihoods(reference)
        assert max(abs(a - b) for a, b in zip(found, right, strict=True)) < TOLERANCE, (found, right)


def token_prompts(target: Target) -> None:
    ids = _likelihoods(_evaluate(target, "numerals", tokenized_requests=True, batch_size=4))
    assert max(abs(a - b) for a, b in zip(ids, _of_texts(target), strict=True)) < TOLERANCE


def tokenizer(target: Target) -> None:
    from lm_eval.utils import check_remote_tokenizer_support

    assert check_remote_tokenizer_support(f"{target.v1}/completions", auth_token=target.key)


def completions(target: Target) -> None:
    assert len(_written(_evaluate(target, "numerals_written"))) == LIMIT


def chat(target: Target) -> None:
    assert len(_written(_evaluate(target, "numerals_written", "local-chat-completions"))) == LIMIT


def stop(target: Target) -> None:
    assert not any("\n" in text for text in _written(_evaluate(target, "numerals_written")))


def seed(target: Target) -> None:
    how: dict[str, Any] = {"gen_kwargs": {"temperature": 1.0}}
    once, again = (_written(_evaluate(target, "numerals_written", seed=5, **how)) for _ in range(2))
    assert once == again


def auto(target: Target) -> None:
    assert len(_likelihoods(_evaluate(target, "numerals", model="auto"))) == LIMIT * 4


def context_length(target: Target) -> None:
    # It shortens prompts by itself where it knows the context; what the server says goes to its log.
    how: dict[str, Any] = {"max_length": 16 * target.context, "gen_kwargs": {"max_gen_toks": 2 * target.context}}
    error = raised(requests.HTTPError, lambda: _evaluate(target, "numerals_written", **how))
    assert "context_length_exceeded" in error.response.text


CHECKS = (example, chat, stop, seed, auto, completions, echo, token_prompts, tokenizer, context_length)
