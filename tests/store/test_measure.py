"""The report in an expert's file: measured by running all three models, on prompts that the expert was made without."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from store import calibrate, learning, measure, teacher
from store.convert import compress
from store.errors import CheckpointError, InvalidRequestError, TooLargeError
from store.exemplars import MAX_BYTES
from store.expert_file import read_header
from store.floors import BELOW_FLOOR, Floors
from store.held_out import MEASURED, SPARED, fitted, spared, unseen, unseen_rows
from store.labelled import MAX_ANSWER_BYTES, MAX_LABELLED, Labelled, checked, parse_labelled
from store.measure import likeness
from store.measured import Measured, measured_from_json, measured_to_json, rounded
from store.strict_json import FieldError, Fields
from store.teacher import _prompt_tokens, answered, answers, listen, load_model
from store.widening import compress_widening
from tests.tiny import save_base, save_tuned, tokenizer

WORDS = 6
PROMPTS = [f"the river {number} is {'long' if number % 2 else 'wide'}" for number in range(40)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("models")
    base = save_base(root / "base")
    return base, save_tuned(base, root / "tuned", scale=0.1)


@pytest.fixture(autouse=True)
def _short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers of random models end nowhere."""
    monkeypatch.setattr(teacher, "MAX_NEW_TOKENS", WORDS)
    monkeypatch.setattr(learning, "STEPS", 2)
    monkeypatch.setattr(calibrate, "_EPOCHS", 1)
    monkeypatch.setattr(calibrate, "_EVALUATIONS", 2)


def model_of(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def labelled(folders: tuple[Path, Path]) -> list[Labelled]:
    """Answers that the fine-tune gives and the base does not."""
    asked = [f"say {number}" for number in range(12)]
    ours, theirs = ([text.strip() for text in answers(*load_model(folder), asked, WORDS)] for folder in folders)
    rows = [Labelled(*row[:2]) for row in zip(asked, theirs, ours, strict=True) if row[1] and row[1] != row[2]]
    assert len(rows) >= 4
    return rows


@pytest.mark.parametrize("codec", ["raw", "overwrite", "low-rank", "bit-delta", "t-switch", "flex-switch"])
def test_every_codec_is_compared_with_its_fine_tune(folders: tuple[Path, Path], tmp_path: Path, codec: str) -> None:
    base, tuned = folders
    if codec == "overwrite":
        for number, folder in enumerate(folders):
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(tmp_path / str(number))
            tokenizer().save_pretrained(tmp_path / str(number))
        base, tuned = tmp_path / "0", tmp_path / "1"
    options: dict[str, Any] = {"bits_per_param": 1.4} if codec == "flex-switch" else {}
    report = compress(base, tuned, tmp_path / "e", codec=codec, exemplars=PROMPTS, **options)
    measured = report.measured
    assert report.unmeasured is None
    assert read_header(tmp_path / "e").measured == measured
    assert measured.held_out is True
    assert measured.prompts == (SPARED if codec in ("t-switch", "bit-delta", "flex-switch") else MEASURED)
    assert measured.relative_error == pytest.approx(report.relative_error, rel=1e-5, abs=1e-9)
    assert measured.kl is not None
    assert measured.agreement is not None
    if codec in ("raw", "overwrite"):
        assert measured.kl < 2e-3
        assert measured.agreement > 0.2, "any token of a random model may be a tie"
        assert codec == "raw" or (measured.kl, measured.agreement) == (0.0, 1.0)
    else:
        assert measured.kl > 2e-3


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_agreement_is_what_greedy_decoding_gives(tmp_path: Path, architecture: str) -> None:
    """Of packed rows and of padded ones."""
    base = save_base(tmp_path / "base", architecture)
    tuned = save_tuned(base, tmp_path / "tuned", scale=0.01)
    tutor, student = model_of(tuned), model_of(base)
    lessons = listen(tutor, tokenizer(), PROMPTS)
    assert likeness(tutor, lessons) == (pytest.approx(0.0, abs=1e-6), 1.0)
    asked = [_prompt_tokens(tokenizer(), prompt) for prompt in PROMPTS]
    both = [list(answered(model, asked, [256], WORDS)) for model in (tutor, student)]
    equal = sum(one == other for one, other in zip(*both, strict=True)) / len(PROMPTS)
    assert 0 < equal < 1
    kl, agreement = likeness(student, lessons)
    assert kl > 0
    assert agreement == pytest.approx(equal, abs=1.5 / len(PROMPTS)), "a tie may be decided by rounding"


def test_what_is_measured_on_was_not_learned_from(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the fitting methods hear at all of the prompts that count, they hear as held out ones."""
    heard: list[list[str]] = []

    def listening(model: Any, reader: Any, exemplars: Sequence[str]) -> Any:
        heard.append(list(exemplars))
        return listen(model, reader, exemplars)

    for module in ("calibrate", "learning", "measure"):
        monkeypatch.setattr(f"store.{module}.listen", listening)
    for options in ({}, {"codec": "flex-switch", "bits_per_param": 1.4}):
        for count in (33, 70):
            prompts = [f"{number} boats" for number in range(count)]
            heard.clear()
            report = compress(*folders, tmp_path / "e", exemplars=prompts, **options)  # type: ignore[arg-type]
            assert report.measured.held_out
            assert len(heard[-1]) >= SPARED
            assert not set(heard[0]) & set(heard[-1]), (options, count)


def test_retention_is_the_share_of_the_gain_that_is_kept(
    folders: tuple[Path, Path], tmp_path: Path, labelled: list[Labelled], monkeypatch: pytest.MonkeyPatch
) -> None:
    longest = max(len(tokenizer()(row.answer)["input_ids"]) for row in labelled)
    monkeypatch.setattr(measure, "_SPARE_TOKENS", WORDS - longest)
    kept = compress(*folders, tmp_path / "e", codec="raw", labelled=labelled, min_retention=0.5).measured
    assert (kept.base_score, kept.labelled, kept.kl) == (0.0, len(labelled), None)
    assert kept.fine_tune_score == 1.0
    assert kept.retention is not None
    assert kept.retention >= 0.5
    assert read_header(tmp_path / "e").measured == kept
    lost = compress(*folders, tmp_path / "e", density=0.01, labelled=labelled).measured
    assert lost.retention is not None
    assert lost.retention < 0.5
    with pytest.raises(InvalidRequestError, match="of its fine-tune's gain") as caught:
        compress(*folders, tmp_path / "below", density=0.01, labelled=labelled, min_retention=0.9)
    assert (caught.value.param, caught.value.code) == ("min_retention", BELOW_FLOOR)
    assert not (tmp_path / "below").exists()
    with pytest.raises(InvalidRequestError, match="no gain") as caught:
        compress(folders[0], folders[0], tmp_path / "below", labelled=labelled, min_retention=0.9)
    assert (caught.value.param, caught.value.code) == ("labelled", "invalid_request")


def test_what_is_measured_decides_how_far_an_expert_is_widened(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """The l1 knob shouts at low densities, so that each doubling brings the expert far closer."""
    options = {"density": 0.1, "knob": "l1", "exemplars": PROMPTS[:6]}
    wide = compress(*folders, tmp_path / "e", **options | {"density": 0.4}).measured  # type: ignore[arg-type]
    report = compress_widening(*folders, tmp_path / "e", max_kl=wide.kl, **options)
    assert [tried.partition(":")[0] for tried in report.widened] == ["density=0.1", "density=0.2"]
    assert "nats per token away from its fine-tune" in report.widened[0]
    assert report.measured == wide
    assert wide.held_out, "the l1 knob hears no exemplars"


def test_a_fine_tune_that_cannot_run_is_not_compared_unless_that_was_asked(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    base, tuned = folders
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "model.safetensors").write_bytes((tuned / "model.safetensors").read_bytes())
    report = compress(base, bare, tmp_path / "e", codec="raw", exemplars=PROMPTS)
    assert report.unmeasured is not None
    assert "cannot be loaded" in report.unmeasured
    assert report.measured == rounded(Measured(report.relative_error))
    for asked in ({"max_kl": 9.0}, {"labelled": [Labelled("a", "b")]}):
        with pytest.raises(CheckpointError, match="cannot be loaded"):
            compress(base, bare, tmp_path / "f", codec="raw", exemplars=PROMPTS, **asked)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"max_kl": 0.1}, "max_kl"),
        ({"min_agreement": 0.9}, "min_agreement"),
        ({"min_agreement": 1.5, "exemplars": ["a"]}, "min_agreement"),
        ({"min_retention": 0.9, "exemplars": ["a"]}, "min_retention"),
        ({"labelled": []}, "labelled"),
        ({"labelled": [Labelled("a", "b")], "exemplars": ["a"]}, "labelled"),
    ],
)
def test_what_cannot_be_measured_is_said_before_the_work(
    folders: tuple[Path, Path], tmp_path: Path, asked: dict[str, Any], param: str
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        compress(*folders, tmp_path / "e", **asked)
    assert caught.value.param == param


@settings(deadline=None)
@given(st.integers(1, 200), st.integers(1, 150))
def test_exemplars_are_parted(count: int, most: int) -> None:
    exemplars = [str(number) for number in range(count)]
    for part in (fitted, spared):
        apart = part(exemplars, most)
        assert set(apart.seen) | set(apart.measured) <= set(exemplars)
        assert 1 <= len(apart.measured) <= MEASURED
        chosen = min(count, most) if part is spared else count
        assert apart.held_out == (chosen >= 2 * SPARED or (part is fitted and count - most >= SPARED))
    assert unseen(exemplars).held_out
    assert unseen(exemplars).seen == []


@settings(deadline=None)
@given(
    st.builds(
        Measured,
        relative_error=st.floats(0, 1e6),
        kl=st.none() | st.floats(0, 100),
        agreement=st.none() | st.floats(0, 1),
        prompts=st.none() | st.integers(1, 32),
        held_out=st.none() | st.booleans(),
        score=st.none() | st.floats(0, 1),
        base_score=st.none() | st.floats(0, 1),
        fine_tune_score=st.none() | st.floats(0, 1),
        labelled=st.none() | st.integers(1, 200),
    )
)
def test_a_report_survives_its_file(measured: Measured) -> None:
    stored = rounded(measured)
    assert rounded(stored) == stored
    text = json.dumps(measured_to_json(measured))
    assert measured_from_json(Fields(json.loads(text), "report")) == stored


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"relative_error": -1}, "relative_error"),
        ({"relative_error": None}, "relative_error"),
        ({"kl": "0"}, "kl"),
        ({"agreement": 1.5}, "agreement"),
        ({"prompts": 0}, "prompts"),
        ({"held_out": 1}, "held_out"),
        ({"labelled": 1.5}, "labelled"),
    ],
)
def test_a_report_that_lies_about_its_own_form_is_refused(change: dict[str, object], field: str) -> None:
    with pytest.raises(FieldError) as caught:
        measured_from_json(Fields({"relative_error": 0.5} | change, "report"))
    assert caught.value.field == field


def test_floors_are_told_apart() -> None:
    measured = Measured(0.5, kl=0.2, agreement=0.8, score=0.6, base_score=0.2, fine_tune_score=1.0)
    Floors(max_kl=0.2, min_agreement=0.8, min_retention=0.5).check(measured)
    for floor in ({"max_kl": 0.1}, {"min_agreement": 0.9}, {"min_retention": 0.6}):
        with pytest.raises(InvalidRequestError) as caught:
            Floors(**floor).check(measured)
        assert (caught.value.param, caught.value.code) == (next(iter(floor)), BELOW_FLOOR)
    assert dataclasses.replace(measured, fine_tune_score=0.1).retention is None


def test_labelled_lines() -> None:
    data = b'{"prompt": "1 + 1", "answer": "2"}\n\n{"messages": [{"role": "user", "content": "x"}], "answer": " y "}\n'
    assert parse_labelled(data + data) == [Labelled("1 + 1", "2"), Labelled("x", " y ")]
    assert unseen_rows(parse_labelled(data), ["x"]) == [Labelled("1 + 1", "2")]


def _broken(line: object) -> Callable[[], object]:
    return lambda: parse_labelled(b'{"prompt": "a", "answer": "b"}\n' + json.dumps(line).encode())


@pytest.mark.parametrize(
    "act",
    [
        _broken("bare"),
        _broken({"prompt": "c"}),
        _broken({"prompt": "c", "answer": 1}),
        _broken({"prompt": "c", "answer": " "}),
        _broken({"prompt": " ", "answer": "b"}),
        _broken({"prompt": "a", "answer": "c"}),
        _broken({"prompt": "c", "answer": "b" * (MAX_ANSWER_BYTES + 1)}),
    ],
)
def test_labelled_lines_that_are_none_are_named(act: Callable[[], object]) -> None:
    with pytest.raises(InvalidRequestError, match="line 2") as caught:
        act()
    assert caught.value.param == "labelled"


def test_labelled_exemplars_are_bounded() -> None:
    with pytest.raises(TooLargeError):
        parse_labelled(b"x" * (MAX_BYTES + 1))
    with pytest.raises(InvalidRequestError, match="no labelled"):
        parse_labelled(b"\n")
    with pytest.raises(InvalidRequestError, match="at most"):
        checked([Labelled(str(number), "x") for number in range(MAX_LABELLED + 1)])
