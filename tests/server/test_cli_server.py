"""Verbs that talk to a server, as a user types them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from server.cli import main
from server.client import Client
from server.jobs import jobs
from store.card import Card
from store.expert_file import digest_of
from tests.api.house import make_expert
from tests.server.live import live_server
from tests.store.keys import ADA

Run = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with live_server(tmp_path_factory.mktemp("server")) as url:
        yield url


@pytest.fixture
def run(server: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a verb: its exit code, and what it said, in one line."""
    monkeypatch.setenv("SWITCHYARD_SERVER", server)
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: str) -> tuple[int, str]:
        code = 0
        try:
            main(list(arguments))
        except SystemExit as end:
            code = int(end.code or 0)
        said = capsys.readouterr()
        return code, " ".join((said.out + said.err).split())

    return call


def test_an_expert_under_many_names(run: Run, server: str, tmp_path: Path) -> None:
    file = make_expert(tmp_path / "cron.safetensors", value=1, name="cron", card=Card(tags=("time", "tools")))
    (tmp_path / "cron.safetensors.sig").write_text(ADA.sign(digest_of(file)))
    other = make_expert(tmp_path / "other.safetensors", value=2, name="other")
    assert run("push", str(file))[0] == 0
    assert run("push", str(other))[0] == 0
    assert Client(server).experts(query="cron")[0]["signed_by"]["fingerprint"].startswith("SHA256:")
    assert (
        run("describe", "cron", "--description", "crontabs", "--tag", "time", "--meta", "a=1", "--meta", "b=2")[0] == 0
    )
    assert run("describe", "cron", "--meta", "a=")[0] == 0
    [cron] = Client(server).experts(tags=["time"])
    assert (cron["description"], cron["tags"], cron["metadata"]) == ("crontabs", ["time"], {"b": "2"})
    assert run("describe", "cron", "--meta", "a")[0] == 1
    assert run("alias", "schedule", "cron") == (0, "schedule is cron")
    code, said = run("list", "--tag", "time")
    assert code == 0
    assert "cron = schedule" in said
    assert "other" not in said
    assert "no such experts" in run("list", "--query", "zzz")[1]
    assert run("alias", "cron", "other")[0] == 1
    assert run("alias", "schedule", "other") == (0, "schedule is other")
    code, said = run("rm", "other")
    assert code == 1
    assert "also called schedule" in said
    assert run("unalias", "schedule")[0] == 0
    assert run("unalias", "schedule")[0] == 1
    assert run("rm", "other") == (0, "removed other")
    run("alias", "schedule", "cron")
    assert run("rm", "cron", "--force") == (0, "removed cron")
    assert Client(server).experts() == []


def test_a_pushed_folder_is_compressed_as_asked_and_told_of(
    run: Run, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "_MODULE", "tests.server.strange_job")
    (tmp_path / "tuned").mkdir()
    file = make_expert(tmp_path / "tuned" / "model.safetensors", value=7)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('"a river"\n"a house"\n')
    options = {"codec": "flex-switch", "max_size": 500_000, "loss": "mse", "strength": 2.0, "knob": "l1"}
    options |= {"tensor_density": {"*.norm.*": 0.0, "*": 0}, "max_kl": 0.5, "min_agreement": 0.1, "widen": True}
    words = ["--codec", "flex-switch", "--max-size", "500KB", "--loss", "mse", "--strength", "2", "--knob", "l1"]
    words += ["--tensor-density", "*.norm.*=0", "--tensor-density", "*=0", "--max-kl", "0.5", "--min-agreement", "0.1"]
    code, said = run("push", str(tmp_path / "tuned"), "--name", "raw", "--exemplars", str(prompts), *words, "--widen")
    assert code == 0, said
    for part in (
        "raw is live (1 bytes, 0.100 bits per parameter, relative error 0.500",
        "KL to the fine-tune: 0.2500 nats/token on 16 exemplars held out",
        "same answers: 75.0% of the fine-tune's greedy ones",
        "retention: 71.4% (exact match 0.700",
        "widened: density=0.02: it would be far away",
        "only 2.0% of the weights changed at all: --codec overwrite keeps every bit",
    ):
        assert part in said
    job = Client(server)._send("GET", "/v1/jobs").json()["data"][0]
    assert options.items() <= job["report"]["asked"].items()
    code, said = run("push", str(file), "--density", "0.1")
    assert code == 1
    assert "is compressed already" in said
    assert run("rm", "raw")[0] == 0
