"""Verbs that need no server, as a user types them."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.cli import main
from server.cli_files import card_of
from store.card import Card
from store.errors import InvalidRequestError
from store.expert_file import digest_of
from tests.store.builders import write_sample


def test_inspect_shows_the_card(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    card = Card("Ada", "MIT", ("numbers", "language:fr"), ("a" * 64,), {"eval.loss": "[0.3]"})
    assert run("inspect", str(write_sample(tmp_path / "e", card=card))) == 0
    said = " ".join(capsys.readouterr().out.split())
    for part in ("author Ada", "licence MIT", "tags numbers, language:fr", f"made from {'a' * 64}", "eval.loss [0.3]"):
        assert part in said


def test_what_the_options_say(tmp_path: Path) -> None:
    parent = write_sample(tmp_path / "parent")
    card = card_of("Ada", "MIT", ["x"], [str(parent), "b" * 64], ["k=v=w", "l="])
    assert card == Card("Ada", "MIT", ("x",), (digest_of(parent), "b" * 64), {"k": "v=w", "l": ""})
    for given, param in (
        (("", "", ["No"], None, None), "tags"),
        (("", "", None, ["gone.safetensors"], None), "parents"),
        (("", "", None, None, ["k"]), "meta"),
        (("", "", None, None, ["k=1", "k=2"]), "meta"),
    ):
        with pytest.raises(InvalidRequestError) as caught:
            card_of(*given)  # type: ignore[arg-type]
        assert caught.value.param == param


def run(*arguments: str) -> int:
    """Run a verb; its exit code."""
    try:
        main(list(arguments))
    except SystemExit as end:
        return int(end.code or 0)
    return 0
