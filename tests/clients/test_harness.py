"""The checks of clients can fail: what a client may not do is noticed, and what it cannot do is told."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.clients import fence
from bench.clients.example import aimed, block
from bench.clients.features import FEATURES
from bench.clients.run import ROOT, ClientError, check
from bench.clients.target import Target, check_cancelled, check_echo, check_trip, raised
from bench.conformance import FAILS, NOT_OFFERED, REFUSED, WORKS, verdict

OUTSIDE = "192.0.2.1"
"""An address that is nobody's, for documentation."""
NOWHERE = Target(
    "http://127.0.0.1:1", "k", "tiny", ("rivers", "numbers"), ("x", "base"), 9, "x", 1, 2, "", "", "", "/tmp"
)


def fenced(code: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    (tmp_path / "strayer.py").write_text(code, encoding="utf-8")
    return subprocess.run(
        [sys.executable, "-m", "bench.clients.fence", "strayer"],
        env=fence.environment(PYTHONPATH=f"{ROOT}:{tmp_path}"),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("where", [f"('{OUTSIDE}', 80)", "('example.org', 443)"])
def test_nobody_leaves_the_machine_not_even_in_secret(where: str, tmp_path: Path) -> None:
    code = f"import socket\ntry:\n    socket.create_connection({where}, timeout=5)\nexcept OSError:\n    pass\n"
    done = fenced(code, tmp_path)
    assert done.returncode == 3
    assert "wanted to reach" in done.stderr


def test_this_machine_may_be_reached(tmp_path: Path) -> None:
    code = (
        "import socket\ns = socket.create_server(('127.0.0.1', 0))\nsocket.create_connection(s.getsockname()).close()\n"
    )
    assert fenced(code, tmp_path).returncode == 0


def test_settings_of_the_shell_do_not_reach_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", "https://example.org")
    monkeypatch.setenv("LANGSMITH_API_KEY", "x")
    given = fence.environment(OPENAI_API_KEY="mine")
    assert given["OPENAI_API_KEY"] == "mine"
    assert not {"OPENAI_BASE_URL", "LANGSMITH_API_KEY"} & given.keys()


def test_every_feature_fails_where_there_is_no_server() -> None:
    found = check("openai (Python)", NOWHERE, ["chat", "best_of", "auth", "embeddings"])
    assert set(found) == {"chat", "best_of", "auth", "embeddings"}
    assert all(found.values())


def test_a_client_that_cannot_start_is_an_error_that_tells_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules["bench.clients.run"].CLIENTS, "strange", "with_nobody")
    with pytest.raises(ClientError, match="with_nobody"):
        check("strange", NOWHERE)


def test_verdicts() -> None:
    chat = next(feature for feature in FEATURES if feature.id == "chat")
    best_of = next(feature for feature in FEATURES if feature.id == "best_of")
    assert verdict(chat, {"chat": None}) == WORKS
    assert verdict(best_of, {"best_of": None}) == REFUSED
    assert verdict(chat, {}) == NOT_OFFERED
    assert verdict(chat, {"chat": "boom"}) == f"{FAILS}: boom"


def test_features_have_one_name_each() -> None:
    assert len({feature.id for feature in FEATURES}) == len(FEATURES)


@pytest.mark.parametrize(
    ("text", "tokens", "logprobs"),
    [
        ("yx", ["x"], [None]),
        ("x", ["y"], [None]),
        ("xy", ["x", "y"], [-1.0, -1.0]),
        ("xy", ["x", "y"], [None, None]),
        ("xy", ["x", "y"], [None, 0.5]),
    ],
)
def test_an_echo_that_does_not_add_up(text: str, tokens: list[str], logprobs: list[Any]) -> None:
    with pytest.raises(AssertionError):
        check_echo("x", text, tokens, logprobs)


@pytest.mark.parametrize("trip", [{}, {"city": "Rome"}, {"city": "Bonn", "days": 1}, {"city": "Rome", "days": 10}])
def test_an_answer_that_breaks_its_schema(trip: dict[str, Any]) -> None:
    with pytest.raises(AssertionError):
        check_trip(trip)


def test_an_answer_that_goes_on_unread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.clients.target.WAIT_SECONDS", 0.0)
    monkeypatch.setattr(Target, "gone", lambda _: 1.0)
    with pytest.raises(AssertionError, match="nobody reads"):
        check_cancelled(NOWHERE, lambda: None)
    with pytest.raises(AssertionError, match="there was no ValueError"):
        raised(ValueError, lambda: None)


def test_targets_cross_processes() -> None:
    assert Target.from_json(NOWHERE.to_json()) == NOWHERE
    assert json.loads(NOWHERE.to_json())["experts"] == ["rivers", "numbers"]


def test_examples_are_aimed_at_the_server_at_hand() -> None:
    code = 'OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")  # num_es and num_fr, nonesuch'
    there = 'OpenAI(base_url="http://127.0.0.1:1/v1", api_key="k")  # rivers and numbers, nonesuch'
    assert aimed(code, NOWHERE) == there
    assert block("A", "sh", "## A\n\ntext\n\n```sh\nls\n```\n") == "ls\n"
    with pytest.raises(LookupError):
        block("nothing", "python")
