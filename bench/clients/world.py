"""A live server to check clients against: around a tiny base that is made here, or around a given one."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from bench.clients.target import QUESTION, Target
from bench.served import serving
from store.errors import EngineDeadError

KEY = "sy-conformance"
BASE = "tiny"
CONTEXT = 4096
"""Long enough that a stream of the tiny base is still at work when its client gives it up."""
THEMES = {
    "rivers": ["the river {} is long", "how deep is the water of {}", "boats sail along the {}"],
    "numbers": ["add 4{} and 17", "what is 3{} times 12", "subtract 9 from 8{}"],
}
TEMPLATE = (
    "{% if tools %}<|system|>Tools: {{ tools | tojson }}. Call one as <tool_call>...</tool_call>.<|end|>{% endif %}"
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""Of the tiny base: one that knows tools."""


def make_tiny(folder: Path) -> list[str | Path]:
    """Write a tiny base and two experts of it; returns what `switchyard serve` is told."""
    from store.convert import compress
    from tests.tiny import save_base, save_tuned

    base = save_base(folder / "base")
    _amend(base / "config.json", max_position_embeddings=CONTEXT)
    (base / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    (folder / "experts").mkdir()
    for seed, (name, forms) in enumerate(THEMES.items(), start=1):
        tuned = save_tuned(base, folder / name, seed=seed)
        exemplars = [form.format(i) for i in range(8) for form in forms]
        out = folder / "experts" / f"{name}.safetensors"
        compress(base, tuned, out, density=0.3, knob="l1", exemplars=exemplars, name=name, cache_dir=folder / "cache")
    return ["--base", base, "--base-name", BASE, "--experts", folder / "experts", "--feature-layer", "2",
            "--kv-bytes", "32MiB"]  # fmt: skip


def _amend(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | values), encoding="utf-8")


@contextmanager
def live(folder: Path, options: Sequence[str | Path]) -> Iterator[Target]:
    """Serve, and have a second server beside it whose engine fails in the middle of every answer."""
    places = ("--data-dir", folder / "data", "--cache-dir", folder / "cache")
    with serving(*options, *places, "--api-keys", KEY) as url, _failing(folder / "failing") as (failing, model):
        base = Path(options[options.index("--base") + 1])
        yield _target(url, failing, model, base if base.is_dir() else None, folder)


@contextmanager
def _failing(folder: Path) -> Iterator[tuple[str, str]]:
    from tests.server.live import live_house

    with live_house(folder, api_keys=KEY) as (url, house):
        house.engine.failure, house.engine.fail_after = EngineDeadError("the engine has failed"), 3
        yield url, house.engine.base.name


def _target(url: str, failing: str, failing_model: str, base: Path | None, folder: Path) -> Target:
    half = Target(url, KEY, "", ("", ""), (QUESTION, ""), 0, "", 0, 0, failing, failing_model, "", str(folder))
    models = json.loads(half.get("/v1/models"))["data"]
    experts = [model["id"] for model in models if "digest" in model and "alias_of" not in model]
    if len(experts) < 2:
        raise SystemExit("two experts are needed: give a folder of expert files with --experts")
    tokens = {text: half.post("/tokenize", {"prompt": text, "add_special_tokens": False}) for text in ("x", "}")}
    routed = _routed(half, experts)
    return Target(
        url,
        KEY,
        models[0]["id"],
        (experts[0], experts[1]),
        routed,
        tokens["x"]["max_model_len"],
        "x",
        tokens["x"]["tokens"][0],
        tokens["}"]["tokens"][0],
        failing,
        failing_model,
        str(base or ""),
        str(folder),
    )


def _routed(target: Target, experts: list[str]) -> tuple[str, str]:
    """A prompt that some expert is for, one of its exemplars, and the mix that routing gives it."""
    for name in experts:
        prompts: list[str] = json.loads(target.get(f"/v1/experts/{name}/exemplars"))["exemplars"]
        for prompt in prompts:
            messages = [{"role": "user", "content": prompt}]
            if parts := target.post("/v1/route", {"messages": messages})["mix"]:
                return prompt, ",".join(f"{part['id']}={part['weight']:g}" for part in parts)
    return QUESTION, "base"
