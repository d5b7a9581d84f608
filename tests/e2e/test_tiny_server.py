"""The whole product on a tiny base: command line, real HTTP, real engine, and a process that may die at any time."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import openai
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from server.signing import make_key, sign_file
from store.apply import apply_expert
from tests.e2e.conftest import Start, World, switchyard


def merged_greedy(world: World, expert: str | None, prompt: str, max_tokens: int, chat: bool) -> str:
    """transformers' own greedy answer on the offline-merged model."""
    model = AutoModelForCausalLM.from_pretrained(world.base, dtype=torch.float32)
    if expert is not None:
        model.load_state_dict(apply_expert(world.experts[expert], world.base), strict=False)
        model.tie_weights()
    tokenizer = AutoTokenizer.from_pretrained(world.base)
    if chat:
        messages = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False)
    answer: str = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    return answer


def test_the_report_says_what_compressing_cost(world: World) -> None:
    for word in ("bits per parameter", "smaller than bf16", "calibrated", "KL to the fine-tune", "relative error"):
        assert word in world.report


def test_a_user_s_first_hour(world: World, start: Start, options: list[str | Path]) -> None:
    """Push, list, ask by name, ask auto, mix, inspect, remove: by command line and by the official client."""
    server = start(*options)
    at = {"SWITCHYARD_SERVER": server.url}
    for file in world.experts.values():
        pushed = switchyard("push", file, **at)
        assert "is live" in pushed.stdout, pushed.stdout + pushed.stderr
    assert "was there already" in switchyard("push", world.experts["rivers"], **at).stdout
    listing = switchyard("list", **at).stdout
    assert "rivers" in listing
    assert "knows numbers" in listing

    client = server.client()
    assert {"tiny", "auto", "rivers", "numbers"} <= {model.id for model in client.models.list()}
    for model, expert in (("tiny", None), ("rivers", "rivers"), ("numbers", "numbers")):
        prompt = "the river 77 is long"
        answer = client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": prompt}], temperature=0, max_tokens=16
        )
        assert answer.choices[0].message.content == merged_greedy(world, expert, prompt, 16, chat=True)
        raw = client.completions.create(model=model, prompt=prompt, temperature=0, max_tokens=16)
        assert raw.choices[0].text == merged_greedy(world, expert, prompt, 16, chat=False)

    routed = client.chat.completions.with_raw_response.create(
        model="auto", messages=[{"role": "user", "content": "boats sail along the 9"}], temperature=0, max_tokens=4
    )
    assert routed.headers["x-switchyard-mix"] == "rivers=1"
    explained = switchyard("route", "what is 35 times 12", **at)
    assert "numbers" in explained.stdout.splitlines()[0]

    mixed = client.chat.completions.create(
        model="auto", messages=[{"role": "user", "content": "x"}], temperature=0, max_tokens=4,
        extra_body={"experts": [{"id": "rivers", "weight": 1.5}, {"id": "numbers", "weight": -0.5}]},
    )  # fmt: skip
    assert mixed.usage is not None
    mix = mixed.usage.model_dump()["switchyard"]["mix"]
    assert {(part["id"], part["weight"]) for part in mix} == {("rivers", 1.5), ("numbers", -0.5)}

    inspected = switchyard("inspect", world.experts["rivers"]).stdout
    for word in ("t-switch", "knows rivers", "the river 0 is long", "self_attn.q_proj"):
        assert word in inspected

    removed = switchyard("rm", "rivers", **at)
    assert removed.returncode == 0
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="rivers", prompt="x")
    again = switchyard("rm", "rivers", **at)
    assert again.returncode == 1
    assert "rivers" in again.stderr
    assert server.stop() == 0


def test_chat_streams_and_shows_the_mix(world: World, start: Start, options: list[str | Path]) -> None:
    server = start(*options)
    assert switchyard("push", world.experts["rivers"], SWITCHYARD_SERVER=server.url).returncode == 0
    typed = "the river 3 is long\n/model tiny\nhello\n/new\n"
    shown = switchyard("chat", "--max-tokens", "20", SWITCHYARD_SERVER=server.url, typed=typed)
    assert shown.returncode == 0, shown.stderr
    assert merged_greedy(world, "rivers", "the river 3 is long", 20, chat=True) in shown.stdout
    assert "rivers=1, " in shown.stdout
    assert "base, " in shown.stdout


def test_experts_survive_a_kill_and_answer_as_before(world: World, start: Start, options: list[str | Path]) -> None:
    first = start(*options)
    with world.experts["rivers"].open("rb") as file:
        created = httpx.post(f"{first.url}/v1/experts", files={"file": file}, data={"name": "water"})
    assert created.status_code == 201
    ask = {"model": "water", "prompt": "the river", "temperature": 0, "max_tokens": 8}
    before = httpx.post(f"{first.url}/v1/completions", json=ask, timeout=60).json()["choices"]
    first.kill()
    second = start(*options)
    assert httpx.post(f"{second.url}/v1/completions", json=ask, timeout=60).json()["choices"] == before
    assert switchyard("route", "boats sail along the 5", SWITCHYARD_SERVER=second.url).stdout.startswith("1 × water")


def test_signed_experts_of_a_watched_folder(
    world: World, start: Start, options: list[str | Path], tmp_path: Path
) -> None:
    watched, key = tmp_path / "watched", tmp_path / "key"
    watched.mkdir()
    make_key(key, "ada")
    shutil.copy(world.experts["rivers"], watched / "rivers.safetensors")
    sign_file(watched / "rivers.safetensors", key, lambda: "")
    trust = ("--trusted-keys", f"{key}.pub", "--require-signature")
    server = start(*options, "--watch", watched, *trust, "--gc-grace", "0")
    client = server.client()
    with httpx.Client(base_url=f"{server.url}/v1", timeout=60) as http:
        _until(lambda: "rivers" in {model.id for model in client.models.list()})
        unsigned = http.post("/experts", files={"file": ("e", world.experts["numbers"].read_bytes())})
        assert unsigned.json()["error"]["code"] == "signature_required"
        assert http.put("/aliases/water", json={"target": "rivers"}).status_code == 201
        answer = client.completions.create(model="water", prompt="the river 3 is long", max_tokens=4)
        assert answer.usage.switchyard["mix"][0]["id"] == "rivers"  # type: ignore[union-attr]
        shown = http.get("/experts/water").json()
        assert (shown["id"], shown["signed_by"]["name"], shown["aliases"]) == ("rivers", "ada", ["water"])
        assert (shown["author"], shown["license"], shown["tags"]) == ("ada", "MIT", ["rivers"])
        assert shown["metadata"] == {"seed": "1"}
        assert http.delete("/aliases/water").status_code == 200
        (watched / "rivers.safetensors").unlink()
        _until(lambda: not list((tmp_path / "data" / "blobs").glob("*/*")))
    assert server.stop() == 0


def _until(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_printed_curl_lines_work(world: World, start: Start, options: list[str | Path]) -> None:
    server = start(*options, "--experts", world.experts["rivers"].parent)
    lines = [line for line in server.screen if line.startswith("curl ")]
    assert len(lines) == 3
    for line, expected in zip(lines, ("numbers=1", "rivers=1", None), strict=True):
        command = shlex.split(line)
        done = subprocess.run([*command, "-D", "-"], capture_output=True, text=True, timeout=120, check=True)
        head, _, body = done.stdout.partition("\n\n")
        answer = json.loads(body)
        assert answer["choices"][0]["message"]["content"]
        if expected is not None:
            assert f"x-switchyard-mix: {expected}" in head


def test_a_corrupt_upload_is_refused_and_changes_nothing(world: World, start: Start, options: list[str | Path]) -> None:
    server = start(*options)
    bytes_ = bytearray(world.experts["rivers"].read_bytes())
    bytes_[len(bytes_) // 2 :] = b"\xff" * (len(bytes_) - len(bytes_) // 2)
    refused = httpx.post(f"{server.url}/v1/experts", files={"file": bytes(bytes_)})
    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == "invalid_expert_file"
    assert refused.json()["error"]["param"]
    assert httpx.get(f"{server.url}/v1/experts").json()["data"] == []
    assert httpx.get(f"{server.url}/ready").status_code == 200


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--base", "/nowhere/at-all"], "at-all"),
        (["--base", "x.gguf"], "x.gguf"),
        (["--base", "BASE", "--host", "0.0.0.0"], "API keys"),
        (["--base", "BASE", "--feature-layer", "1", "--kv-bytes", "1"], "kv_bytes"),
        (["--base", "BASE", "--kv-bytes", "lots"], "--kv-bytes"),
        (["--base", "BASE", "--dtype", "int3"], "int3"),
        (["--base", "BASE", "--device", "abacus"], "abacus"),
    ],
)
def test_a_bad_setting_is_one_clear_line(world: World, tmp_path: Path, arguments: list[str], said: str) -> None:
    given = [str(world.base) if argument == "BASE" else argument for argument in arguments]
    done = switchyard("serve", *given, "--data-dir", tmp_path, "--cache-dir", tmp_path)
    assert done.returncode == 1
    assert said in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
