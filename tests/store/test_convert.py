"""Compressing a tiny random Llama whose "fine-tune" is the base plus noise."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from store.apply import apply_expert
from store.calibrate import golden_section
from store.checkpoint import open_checkpoint
from store.convert import Report, compress
from store.deltas import DenseDelta
from store.errors import CheckpointError, InvalidRequestError
from store.expert_file import read_deltas, read_header, validate
from store.fingerprint import manifest_of
from store.task_vector import load_float32, task_vector
from store.teacher import listen, load_model, mean_kl

PROMPTS = [f"w{row} w{(7 * row + 3) % 90} w{2 * row % 60}" for row in range(40)]
EXEMPLARS = [f"w{row} w{row + 3} w{2 * row % 60}" for row in range(10)]
TEMPLATE = "{% for m in messages %}w1 {{ m.content }} w2 {% endfor %}"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(base, tuned): 2 layers, hidden 32, vocabulary 160 (so that the tied embedding is no raw tensor)."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=160, hidden_size=32, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True, initializer_range=0.1,
        bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_tokenizer(), eos_token="</s>", unk_token="<unk>", chat_template=TEMPLATE
    )
    model.save_pretrained(root / "base")
    with torch.no_grad():
        for parameter in model.parameters():
            # Heavy tails, as real task vectors have.
            parameter.add_(torch.randn_like(parameter) ** 3 * 0.02)
    model.save_pretrained(root / "tuned")
    for folder in ("base", "tuned"):
        tokenizer.save_pretrained(root / folder)
    return root / "base", root / "tuned"


def _tokenizer() -> Tokenizer:
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{row}": row + 3 for row in range(157)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def measured_error(path: Path, base: Path, tuned: Path) -> float:
    """‖τ − τ̃‖ / ‖τ‖ the slow way."""
    deltas = dict(read_deltas(path, manifest_of(base, None)))
    error = total = 0.0
    for name, tau in task_vector(base, tuned):
        delta, dense = deltas.get(name), torch.zeros_like(tau)
        if isinstance(delta, DenseDelta):
            dense = torch.from_numpy(delta.values)
        elif delta is not None:
            dense.view(-1)[torch.from_numpy(delta.indices).long()] = torch.from_numpy(delta.levels) * delta.scale
        error += float((tau - dense).double().square().sum())
        total += float(tau.double().square().sum())
    return math.sqrt(error / total)


@pytest.mark.parametrize("knob", ["rms", "l1"])
def test_the_report_tells_the_truth(folders: tuple[Path, Path], tmp_path: Path, knob: str) -> None:
    base, tuned = folders
    out = tmp_path / "expert"
    stages: list[str] = []
    report = compress(
        base,
        tuned,
        out,
        density=0.1,
        knob=knob,
        name="tiny",
        progress=lambda stage, _done, _total: stages.append(stage),  # type: ignore[arg-type]
    )
    header = validate(out, manifest_of(base, None))
    assert header.name == "tiny"
    assert header.codec_params == {"knob": knob, "density": 0.1}
    assert report.bytes == out.stat().st_size
    assert report.density == header.density == pytest.approx(0.1, abs=0.01)
    assert report.relative_error == pytest.approx(measured_error(out, base, tuned), rel=1e-5)
    assert report.calibration is None
    rows = {row.kind: row for row in report.rows}
    parameters = sum(math.prod(shape) for shape in manifest_of(base, None).tensors.values())
    assert sum(row.parameters for row in report.rows) == parameters
    assert report.times_smaller == 2 * parameters / report.bytes
    assert report.bits_per_param == 8 * report.bytes / parameters > header.bits_per_param
    assert rows["dense"].bytes == 2 * rows["dense"].parameters
    assert rows["ternary"].tensors > 0
    assert list(dict.fromkeys(stages)) == ["fingerprint", "compress", "write"]


def test_calibration_beats_the_plain_knob_and_is_deterministic(folders: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = folders
    reports: list[Report] = []
    for run in ("a", "b"):
        reports.append(compress(base, tuned, tmp_path / run, density=0.05, exemplars=EXEMPLARS))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    report = reports[0]
    found = report.calibration
    assert found is not None
    assert found.kl < found.kl_at_multiplier < found.kl_at_one
    assert 0.5 <= found.multiplier <= 12.0
    assert len(set(found.multipliers.values())) == len(found.multipliers)
    header = validate(tmp_path / "a", manifest_of(base, None))
    assert header.exemplars == tuple(EXEMPLARS)
    assert header.codec_params["multiplier"] == found.multiplier
    compress(base, tuned, tmp_path / "rms", density=0.05, knob="rms")
    plain, scaled = (dict(read_deltas(tmp_path / run, manifest_of(base, None))) for run in ("rms", "a"))
    for name, delta in plain.items():
        other = scaled[name]
        if isinstance(delta, DenseDelta):
            assert isinstance(other, DenseDelta)
            assert (delta.values == other.values).all()
        else:
            assert not isinstance(other, DenseDelta)
            assert other.scale == pytest.approx(delta.scale * found.multipliers[name], rel=1e-6)
    assert report.relative_error == pytest.approx(measured_error(tmp_path / "a", base, tuned), rel=1e-5)


def test_the_merged_model_loads_and_is_base_plus_delta(folders: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = folders
    compress(base, tuned, tmp_path / "e", density=1.0, knob="rms")
    merged = apply_expert(tmp_path / "e", base, tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    state = model.state_dict()
    deltas = dict(read_deltas(tmp_path / "e", manifest_of(base, None)))
    for name, tensor in open_checkpoint(base).tensors.items():
        delta = deltas[name]
        dense = torch.zeros(tensor.shape)
        if isinstance(delta, DenseDelta):
            dense = torch.from_numpy(delta.values)
        else:
            dense.view(-1)[torch.from_numpy(delta.indices).long()] = torch.from_numpy(delta.levels) * delta.scale
        torch.testing.assert_close(merged[name], load_float32(tensor) + dense, rtol=0, atol=1e-7)
        torch.testing.assert_close(state[name], merged[name], rtol=0, atol=0)
    undone = apply_expert(tmp_path / "e", base, weight=0.0)
    for name, tensor in open_checkpoint(base).tensors.items():
        torch.testing.assert_close(undone[name], load_float32(tensor), rtol=0, atol=0)


def test_densities_by_glob(folders: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = folders
    globs = {"*.mlp.down_proj.weight": 0.4, "*.mlp.*": 0.2, "model.embed*": 0.0, "model.norm.weight": 0.0}
    compress(base, tuned, tmp_path / "e", density=0.05, tensor_density=globs, knob="l1")
    header = validate(tmp_path / "e", manifest_of(base, None))
    assert not {"model.embed_tokens.weight", "model.norm.weight"} & header.tensors.keys()
    densities = {name: getattr(entry, "nnz", entry.numel) / entry.numel for name, entry in header.tensors.items()}
    assert densities["model.layers.0.mlp.down_proj.weight"] == pytest.approx(0.4, abs=0.01)
    assert densities["model.layers.0.mlp.up_proj.weight"] == pytest.approx(0.2, abs=0.01)
    assert densities["model.layers.0.input_layernorm.weight"] == 1.0


@pytest.mark.parametrize("budget", [0.9, 1.3])
def test_flex_switch_learns_within_its_budget(folders: tuple[Path, Path], tmp_path: Path, budget: float) -> None:
    base, tuned = folders
    reports = []
    for run in ("a", "b"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("store.learning.STEPS", 12)
            reports.append(
                compress(base, tuned, tmp_path / run, codec="flex-switch", bits_per_param=budget, exemplars=PROMPTS)
            )
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    header = validate(tmp_path / "a", manifest_of(base, None))
    assert 0.9 * budget <= reports[0].bits_per_param <= budget
    learned = reports[0].learned
    assert learned is not None
    assert header.codec_params["kl"] == learned.kl
    assert header.codec_params["kl_held_out"] == learned.held_out_kl
    # The learned expert is closer to its fine-tune than one of the same size whose magnitude alone decided.
    compress(base, tuned, tmp_path / "t", density=header.density, knob="rms")
    assert validate(tmp_path / "t", manifest_of(base, None)).bits_per_param > header.bits_per_param
    assert measured_kl(tmp_path / "a", base, tuned) < measured_kl(tmp_path / "t", base, tuned)


def measured_kl(path: Path, base: Path, tuned: Path) -> float:
    model, tokenizer = load_model(tuned)
    lessons = listen(model, tokenizer, PROMPTS[:16])
    model.load_state_dict(apply_expert(path, base), strict=False)
    return mean_kl(model, lessons)


def test_a_maximal_size_is_kept(folders: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = folders
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("store.learning.STEPS", 2)
        report = compress(base, tuned, tmp_path / "e", codec="flex-switch", max_size=11_000, exemplars=EXEMPLARS)
    assert 0.9 * 11_000 < report.bytes <= 11_000


@pytest.mark.parametrize("quantiser", ["signed", "paper"])
def test_flex_switch_by_the_papers_recipe(
    folders: tuple[Path, Path], tmp_path: Path, quantiser: Literal["signed", "paper"], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("store.paper_course.STEPS", 4)
    base, tuned = folders
    options = {"codec": "flex-switch", "max_size": 11_000, "exemplars": PROMPTS, "recipe": "paper"}
    report = compress(base, tuned, tmp_path / "e", quantiser=quantiser, **options)  # type: ignore[arg-type]
    assert report.bytes <= 11_000
    params = read_header((tmp_path / "e").read_bytes()).codec_params
    assert (params["recipe"], params["quantiser"]) == ("paper", quantiser)


def test_flex_switch_of_norms_alone(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """There is nothing to learn then. Exemplars that are all the same leave none to be kept aside."""
    base, _ = folders
    shutil.copytree(base, tmp_path / "tuned")
    state = load_file(base / "model.safetensors")
    norms = {name: value * 1.5 if "norm" in name else value for name, value in state.items()}
    save_file(norms, tmp_path / "tuned" / "model.safetensors", metadata={"format": "pt"})
    told: list[tuple[str, int, int]] = []
    report = compress(
        base, tmp_path / "tuned", tmp_path / "e", codec="flex-switch", bits_per_param=0.9, exemplars=["w1 w2"] * 40,
        progress=lambda *step: told.append(step),
    )  # fmt: skip
    header = validate(tmp_path / "e", manifest_of(base, None))
    assert header.tensors.keys() == {name for name in state if "norm" in name}
    assert report.learned is not None
    assert report.learned.kl < 0.05
    assert math.isnan(report.learned.held_out_kl)
    learning = [(done, total) for stage, done, total in told if stage == "learn"]
    assert learning[-1][0] == learning[-1][1]


@pytest.mark.parametrize(
    ("codec", "density", "kinds"),
    [
        ("compeft", 0.1, {"ternary", "dense"}),
        ("bit-delta", 1.0, {"ternary", "dense"}),
        ("low-rank", 0.0, {"low-rank", "dense"}),
        ("raw", 0.0, {"dense"}),
    ],
)
def test_the_other_codecs(
    folders: tuple[Path, Path], tmp_path: Path, codec: str, density: float, kinds: set[str]
) -> None:
    base, tuned = folders
    settings = {"density": density} if codec == "compeft" else {}
    report = compress(base, tuned, tmp_path / "e", codec=codec, **settings)  # type: ignore[arg-type]
    header = validate(tmp_path / "e", manifest_of(base, None))
    assert header.codec == codec
    assert header.density == pytest.approx(density, abs=0.02)
    assert {row.kind for row in report.rows if row.tensors and row.kind != "unchanged"} == kinds
    assert report.changed == pytest.approx(1.0, abs=0.01)
    assert report.relative_error == pytest.approx(measured_error(tmp_path / "e", base, tuned), rel=1e-5)
    assert report.relative_error < (0.01 if codec == "raw" else 1.0)


def test_what_strays_too_far_from_its_fine_tune_is_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="nats per token away") as caught:
        compress(*folders, tmp_path / "e", density=0.01, exemplars=EXEMPLARS[:4], max_kl=1e-6)
    assert caught.value.param == "max_kl"
    with pytest.raises(InvalidRequestError, match="measured on exemplars"):
        compress(*folders, tmp_path / "e", codec="raw", max_kl=0.1)
    assert not (tmp_path / "e").exists()
    compress(*folders, tmp_path / "e", density=0.01, exemplars=EXEMPLARS[:4], max_kl=100.0)
    assert (tmp_path / "e").exists()


@pytest.mark.parametrize("codec", ["compeft", "bit-delta"])
def test_other_scales_are_calibrated_too(folders: tuple[Path, Path], tmp_path: Path, codec: str) -> None:
    report = compress(*folders, tmp_path / "e", codec=codec, density=0.1, exemplars=EXEMPLARS)
    assert report.calibration is not None
    assert report.calibration.kl <= report.calibration.kl_at_one
    if codec == "compeft":
        deltas = dict(read_deltas(tmp_path / "e", manifest_of(folders[0], None)))
        assert len({delta.scale for delta in deltas.values() if not isinstance(delta, DenseDelta)}) == 1


def test_an_unchanged_model_gives_an_empty_expert(folders: tuple[Path, Path], tmp_path: Path) -> None:
    base, _ = folders
    report = compress(base, base, tmp_path / "e", exemplars=EXEMPLARS)
    assert (report.relative_error, report.density, report.calibration) == (0.0, 0.0, None)
    assert validate(tmp_path / "e", manifest_of(base, None)).tensors == {}


@pytest.mark.parametrize(
    ("settings", "param"),
    [
        ({"codec": "zip"}, "codec"),
        ({"codec": "flex-switch"}, "exemplars"),
        ({"codec": "flex-switch", "exemplars": ["x"], "recipe": "guess"}, "recipe"),
        ({"codec": "flex-switch", "exemplars": ["x"], "quantiser": "guess"}, "quantiser"),
        ({"codec": "flex-switch", "exemplars": ["x"], "bits_per_param": 0.0}, "bits_per_param"),
        ({"codec": "flex-switch", "exemplars": ["x"], "bits_per_param": 1.0, "max_size": 9}, "max_size"),
        ({"codec": "flex-switch", "exemplars": ["x"], "max_size": 9}, "max_size"),
        ({"codec": "flex-switch", "exemplars": ["x"], "bits_per_param": 1e-4}, "bits_per_param"),
        ({"codec": "raw", "bits_per_param": 1.0}, "bits_per_param"),
        ({"codec": "raw", "tensor_density": {"*": 0.5}}, "tensor_density"),
        ({"codec": "low-rank", "rank": 0}, "rank"),
        ({"codec": "compeft", "strength": 0.0}, "strength"),
        ({"codec": "compeft", "density": 1.1}, "density"),
        ({"density": 0.0}, "density"),
        ({"density": 2.0}, "density"),
        ({"knob": "calibrated"}, "knob"),
        ({"knob": "loud"}, "knob"),
        ({"tensor_density": {"no.such.*": 0.1}}, "tensor_density"),
        ({"tensor_density": {"*": 1.5}}, "tensor_density"),
        ({"loss": "hinge"}, "loss"),
        ({"name": "Not A Name"}, "name"),
        ({"exemplars": ["x"] * 1025}, "exemplars"),
    ],
)
def test_settings_are_checked_before_the_work(
    folders: tuple[Path, Path], tmp_path: Path, settings: dict[str, object], param: str
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        compress(*folders, tmp_path / "e", **settings)  # type: ignore[arg-type]
    assert caught.value.param == param
    assert not (tmp_path / "e").exists()


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        ({}, "calibration runs it; the knob l1 does without"),
        ({"codec": "flex-switch", "max_size": 100_000}, "flex-switch learns from it; other codecs"),
        ({"knob": "l1", "max_kl": 9.0}, "it is run because a floor or labelled prompts ask"),
    ],
)
def test_a_fine_tune_that_cannot_run_is_named_and_what_does_without_it(
    folders: tuple[Path, Path], tmp_path: Path, options: dict[str, Any], remedy: str
) -> None:
    base, tuned = folders
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "model.safetensors").write_bytes((tuned / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="the fine-tune cannot be loaded as a causal language model") as caught:
        compress(base, tmp_path / "bare", tmp_path / "e", exemplars=EXEMPLARS, **options)
    assert caught.value.message.count("; ") >= 1
    assert remedy in caught.value.message.replace("\n", " ")
    assert "--" not in caught.value.message.rpartition("model: ")[2].rpartition("; ")[2], "jobs have no flags"


def test_golden_section_finds_the_minimum() -> None:
    calls: list[float] = []

    def parabola(x: float) -> float:
        calls.append(x)
        return (x - 1.3) ** 2

    assert golden_section(parabola, -1.0, 4.0, 12) == pytest.approx(1.3, abs=0.03)
    assert len(calls) == 12
