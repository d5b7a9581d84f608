"""Verbs that need no server, as a user types them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from rich.console import Console

from deploy.tables import cli_commands
from server import compressing
from server.api.compress_options import CompressOptions
from server.api.jobs import JobBody
from server.cli import main
from server.cli_files import card_of
from server.signing import sign_file
from store.card import Card
from store.codecs.base import CodecName
from store.errors import InvalidRequestError
from store.expert_file import digest_of, read_header
from store.learning import Learned
from store.measured import Measured
from store.report import Report
from tests.store.builders import write_sample
from tests.tiny import save_base, save_tuned


def test_inspect_shows_the_card(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    card = Card("Ada", "MIT", ("numbers", "language:fr"), ("a" * 64,), {"eval.loss": "[0.3]"})
    assert run("inspect", str(write_sample(tmp_path / "e", card=card))) == 0
    said = " ".join(capsys.readouterr().out.split())
    for part in ("author Ada", "licence MIT", "tags numbers, language:fr", f"made from {'a' * 64}", "eval.loss [0.3]"):
        assert part in said


def test_inspect_shows_the_report_and_the_layers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    measured = Measured(0.25, 0.0123, 0.875, 16, True, 0.7, 0.2, 0.9, 100)
    assert run("inspect", str(write_sample(tmp_path / "e", measured=measured))) == 0
    said = " ".join(capsys.readouterr().out.split())
    for part in (
        "relative error 0.2500",
        "KL to the fine-tune 0.0123 nats/token on 16 exemplars held out",
        "same answers 87.5% of the fine-tune's greedy ones",
        "retention 71.4% (exact match 0.700, fine-tune 0.900, base 0.200, on 100 labelled exemplars)",
        "outside",
        "bit-width",
    ):
        assert part in said


def test_compress_says_how_close_it_comes_and_what_it_tried(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With a floor that the l1 knob meets at the second density."""
    base = save_base(tmp_path / "base")
    tuned = save_tuned(base, tmp_path / "tuned", scale=0.03)
    prompts, labelled = tmp_path / "prompts.jsonl", tmp_path / "labelled.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"the river {number}"}) + "\n" for number in range(8)))
    labelled.write_text("".join(json.dumps({"prompt": f"say {n}", "answer": "x"}) + "\n" for n in range(4)))
    out = tmp_path / "e"
    words = ["compress", "--base", str(base), "--tuned", str(tuned), "--out", str(out), "--knob", "l1"]
    words += ["--exemplars", str(prompts), "--cache-dir", str(tmp_path)]
    assert run(*words, "--density", "0.6", "--labelled", str(labelled)) == 0
    floor = read_header(out).measured
    assert floor is not None
    assert floor.kl is not None
    said = " ".join(capsys.readouterr().out.split())
    assert f"KL to the fine-tune: {floor.kl:.4f} nats/token on 8 exemplars held out" in said
    assert "on 4 labelled exemplars" in said
    out.unlink()
    assert run(*words, "--density", "0.3", "--max-kl", str(floor.kl)) == 1
    assert not out.exists()
    assert "max_kl allows" in " ".join(capsys.readouterr().err.split())
    assert run(*words, "--density", "0.3", "--max-kl", str(floor.kl), "--widen") == 0
    assert "widened: density=0.3: the expert would answer" in " ".join(capsys.readouterr().out.split())
    assert run(*words, "--labelled", str(tmp_path / "gone")) == 1
    assert "cannot read" in " ".join(capsys.readouterr().err.split())


def test_inspect_shows_what_was_tried(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    params = {"density": 0.08, "widened": "density=0.02, density=0.04"}
    assert run("inspect", str(write_sample(tmp_path / "e", codec="t-switch", codec_params=params))) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "codec t-switch (density=0.08)" in said
    assert "widened density=0.02, density=0.04: each ended below a floor" in said


@pytest.mark.parametrize(("held_out", "said"), [(math.nan, "0.250;"), (0.5, "0.250, 0.500 on exemplars held out;")])
def test_no_kl_is_made_up_where_no_exemplar_was_held_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], held_out: float, said: str
) -> None:
    learned = Learned({}, 0.25, held_out)
    report = Report(
        bytes=1, bits_per_param=0.1, times_smaller=160.0, density=0.1, relative_error=0.5, changed=1.0, probe=None,
        codec=CodecName.FLEX_SWITCH, knob=None, measured=Measured(0.5), unmeasured=None, calibration=None,
        learned=learned, rows=(), seconds=1.0,
    )  # fmt: skip
    compressing._show(report, tmp_path / "e", Console(width=200))
    shown = " ".join(capsys.readouterr().out.split())
    assert f"nats/token: {said}" in shown
    assert "nan" not in shown


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--bits-per-param", "2", "--codec", "flex-switch"], "--bits-per-param: Input should be less than or equal"),
        (["--density", "0"], "--density: Input should be greater than 0"),
        (["--tensor-density", "*a_b*=1.5"], "--tensor-density *a_b*: Input should be less than or equal to 1"),
        (["--tensor-density", "*"], "--tensor-density must be GLOB=DENSITY, not *"),
        (["--max-size", "big"], "--max-size must be a size"),
        (["--max-kl", "nan"], "--max-kl: Input should be a finite number"),
        (["--max-kl", "1"], "max_kl is measured on exemplars: give some"),
        (["--codec", "flex-switch"], "flex-switch learns from exemplars"),
        (["--max-size", "1MB"], "only flex-switch fits a budget"),
        (["--codec", "raw", "--tensor-density", "*=0.5"], "raw has no density of its own per tensor"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, given: list[str], said: str
) -> None:
    """By `compress` before it looks at the base, and by `push` before it sends anything: in the same words."""
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "tuned").mkdir()
    nowhere = ["--server", "http://127.0.0.1:9"]
    for verb in (
        ["compress", "--base", str(tmp_path / "gone"), "--tuned", str(tmp_path / "gone"), "--out", str(tmp_path / "e")],
        ["push", str(tmp_path / "tuned"), *nowhere],
    ):
        assert run(*verb, *given) == 1
        assert said in " ".join(capsys.readouterr().err.split())


def test_both_verbs_have_every_option_of_compressing() -> None:
    verbs = {name: {option.name for option in command.params} for name, command in cli_commands().items()}
    assert CompressOptions.model_fields.keys() <= verbs["compress"] & verbs["push"]
    assert CompressOptions.model_fields.keys() <= JobBody.model_fields.keys()


@pytest.mark.parametrize("measured", [None, Measured(0.25)])
def test_inspect_makes_no_figures_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], measured: Measured | None
) -> None:
    assert run("inspect", str(write_sample(tmp_path / "e", measured=measured))) == 0
    said = capsys.readouterr().out
    assert ("relative error" in said) == (measured is not None)
    assert not any(word in said for word in ("KL", "same answers", "retention"))


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


def test_keygen_sign_inspect(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, key = write_sample(tmp_path / "e"), tmp_path / "key"
    assert run("inspect", str(file)) == 0
    assert "signed by (nobody)" in " ".join(capsys.readouterr().out.split())
    assert run("keygen", str(key), "--name", "Ada") == 0
    assert key.stat().st_mode & 0o777 == 0o600
    public = (tmp_path / "key.pub").read_text()
    assert public.endswith(" Ada\n")
    assert public.strip() in capsys.readouterr().out
    assert run("keygen", str(key)) == 1
    assert "choose another name" in " ".join(capsys.readouterr().err.split())
    assert run("sign", str(file), "--key", str(key)) == 0
    capsys.readouterr()
    for trusted, said in (("", "no trusted key"), (public.strip(), "Ada (SHA256:"), (f"{key}.pub", "Ada (SHA256:")):
        monkeypatch.setenv("SWITCHYARD_TRUSTED_KEYS", trusted)
        assert run("inspect", str(file)) == 0
        assert said in " ".join(capsys.readouterr().out.split())
    write_sample(file, 1)
    assert run("inspect", str(file)) == 0
    assert "NOT VALID" in " ".join(capsys.readouterr().out.split())
    assert run("sign", str(tmp_path / "key.pub"), "--key", str(key)) == 1
    assert run("sign", str(file), "--key", str(tmp_path / "key.pub")) == 1
    assert "is no key" in " ".join(capsys.readouterr().err.split())


def test_keys_of_other_makers(tmp_path: Path) -> None:
    file = write_sample(tmp_path / "e")
    ed25519, rsa = Ed25519PrivateKey.generate(), generate_private_key(65537, 2048)
    locked = BestAvailableEncryption(b"secret")
    formats = {
        "pem": ed25519.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
        "locked-pem": ed25519.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, locked),
        "locked-ssh": ed25519.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, locked),
    }
    for name, data in formats.items():
        (tmp_path / name).write_bytes(data)
        _, signature = sign_file(file, tmp_path / name, lambda: "secret")
        assert signature.fits(digest_of(file))
        if "locked" in name:
            with pytest.raises(InvalidRequestError, match="passphrase is wrong"):
                sign_file(file, tmp_path / name, lambda: "guess")
    (tmp_path / "rsa").write_bytes(rsa.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    with pytest.raises(InvalidRequestError, match="no ed25519 key"):
        sign_file(file, tmp_path / "rsa", lambda: "")


def run(*arguments: str) -> int:
    """Run a verb; its exit code."""
    try:
        main(list(arguments))
    except SystemExit as end:
        return int(end.code or 0)
    return 0
