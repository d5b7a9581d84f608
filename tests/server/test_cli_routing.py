"""`switchyard exemplars` and `switchyard route`, against a running server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.cli import main
from server.client import Client
from tests.api.house import CRON, FRENCH, make_expert
from tests.server.live import live_server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("server")
    with live_server(folder) as url:
        client = Client(url)
        for value, (name, prompts) in enumerate((("cron", CRON), ("french", FRENCH)), start=1):
            path = make_expert(folder / name, value=value, name=name, exemplars=tuple(prompts))
            client.push(path, name=None, exemplars=None)
        yield url


@pytest.fixture
def said(server: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Said:
    monkeypatch.setenv("SWITCHYARD_SERVER", server)
    return Said(capsys)


class Said:
    """Runs a verb, and tells what it printed."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *arguments: str, code: int = 0) -> str:
        ended = 0
        try:
            main(list(arguments))
        except SystemExit as end:
            ended = int(end.code or 0)
        assert ended == code
        printed = self._capsys.readouterr()
        return " ".join((printed.err if code else printed.out).split())


def test_exemplars_are_shown_replaced_and_given_back(said: Said, tmp_path: Path) -> None:
    assert said("exemplars", "cron") == " ".join(CRON)
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"water plant {n}"}) + "\n" for n in range(7)))
    assert said("exemplars", "cron", str(file)) == "cron is found by 7 exemplars"
    assert "cron" in said("route", "water plant 3").split(":")[0]
    assert said("exemplars", "cron", "--reset") == f"cron is found by {len(CRON)} exemplars"
    assert said("route", CRON[3]).startswith("1 × cron: ")


def test_faults_of_exemplars_are_told(said: Said, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('"one"\n{"no": "prompt"}\n')
    assert "exemplars, line 2" in said("exemplars", "cron", str(file), code=1)
    assert "cannot read" in said("exemplars", "cron", str(tmp_path / "none"), code=1)
    assert "not both" in said("exemplars", "cron", str(file), "--reset", code=1)
    assert "no expert named 'none'" in said("exemplars", "none", "--reset", code=1)


def test_a_report_is_printed_and_drawn(said: Said, tmp_path: Path) -> None:
    picture = tmp_path / "map.png"
    printed = said("route", "--report", "--out", str(picture))
    assert "expert 1 2 other base 1 cron" in printed
    assert "exemplars find their own expert" in printed
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "either a prompt or --report" in said("route", code=1)
    assert "either a prompt or --report" in said("route", "x", "--report", code=1)
