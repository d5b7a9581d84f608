"""The FlexSwitch paper's recipe learns, within its budget, an expert like any other."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from store import paper_course
from store.apply import apply_expert
from store.bas import CELLS
from store.checkpoint import Checkpoint, open_checkpoint
from store.codecs.base import CodecName, Loss
from store.codecs.choice import Recipe
from store.codecs.flex_recipe import FlexRecipe, Quantiser
from store.convert import compress
from store.errors import InvalidRequestError
from store.expert_file import read_header, validate, write_expert
from store.expert_info import ExpertInfo
from store.fingerprint import manifest_of
from store.learning import Learned, learn
from store.lgs import hard_mask
from store.packed import PackedLevels, PackedTensor
from store.paper_course import PaperCourse
from store.soft_student import SoftStudent
from store.task_vector import deltas_between, load_float32
from store.teacher import listen, load_model, mean_kl
from tests.tiny import save_base, save_tuned

PROMPTS = [f"{number} boats" for number in range(40)]
BUDGET = 16_000
QUANTISERS = list(Quantiser)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("models")
    base = save_base(folder / "base")
    return base, save_tuned(base, folder / "tuned")


def learned(folders: tuple[Path, Path], budget: int = BUDGET, **options: Any) -> Learned:
    base, tuned = map(open_checkpoint, folders)
    return learn(base, tuned, PROMPTS, budget, recipe=FlexRecipe.PAPER, **options)


@pytest.mark.parametrize("quantiser", QUANTISERS)
def test_it_learns_an_expert_within_its_budget(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantiser: Quantiser
) -> None:
    base, tuned = folders
    monkeypatch.setattr(paper_course, "STEPS", 1)
    first = learned(folders, quantiser=quantiser)
    monkeypatch.setattr(paper_course, "STEPS", 25)
    found = learned(folders, quantiser=quantiser)
    assert 0.99 * BUDGET < sum(item.nbytes for item in found.tensors.values()) <= BUDGET
    assert found.kl < 0.8 * first.kl
    assert found.held_out_kl < 0.9 * first.held_out_kl
    # The file holds what the model learned with, and is decoded like any other.
    manifest = manifest_of(base, None)
    recipe = Recipe(CodecName.FLEX_SWITCH, recipe=FlexRecipe.PAPER, quantiser=quantiser)
    info = ExpertInfo(codec=recipe.codec.value, codec_params=recipe.params(), tool="tests")
    write_expert(tmp_path / "e", info, found.tensors, manifest)
    header = validate(tmp_path / "e", manifest)
    assert header.codec_params["recipe"] == "paper"
    assert header.codec_params["quantiser"] == quantiser.value
    model, tokenizer = load_model(tuned)
    lessons = listen(model, tokenizer, PROMPTS)
    model.load_state_dict(apply_expert(tmp_path / "e", base), strict=False)
    assert mean_kl(model, lessons) == pytest.approx(found.kl, rel=0.3)
    matrices = [item for item in found.tensors.values() if len(item.shape) > 1]
    if quantiser is Quantiser.SIGNED:
        for name, tau in deltas_between(open_checkpoint(base), open_checkpoint(tuned)):
            if len(tau.shape) > 1:
                assert not bool((decoded(found.tensors[name], name) * tau < 0).any()), name
    else:  # one bit of an asymmetric range is two levels of different magnitude
        assert any(isinstance(item, PackedLevels) for item in matrices)


@pytest.mark.parametrize("loss", list(Loss))
def test_every_loss_can_be_learned_by(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, loss: Loss) -> None:
    monkeypatch.setattr(paper_course, "STEPS", 3)
    told: list[tuple[str, int, int]] = []
    found = learned(folders, loss=loss, progress=lambda *step: told.append(step))
    assert math.isfinite(found.kl)
    assert told == [("learn", done, 6) for done in range(6)] + [("learn", 6, 6)]
    again = learned(folders, loss=loss)
    assert {name: item.payload for name, item in again.tensors.items()} == {
        name: item.payload for name, item in found.tensors.items()
    }


def test_a_budget_for_nothing_is_refused(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paper_course, "STEPS", 1)
    with pytest.raises(InvalidRequestError, match="allow more") as caught:
        learned(folders, 300)
    assert caught.value.param == "bits_per_param"


class Small(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name, shape in (("b", (80,)), ("v", (80, 80)), ("w", (64, 90))):
            self.register_parameter(name, torch.nn.Parameter(torch.randn(shape)))


@pytest.fixture
def checkpoints(tmp_path: Path) -> tuple[Checkpoint, Checkpoint]:
    torch.manual_seed(0)
    base = {name: value.detach().bfloat16().float() for name, value in Small().named_parameters()}
    base["w"] += 1e-6  # one that bfloat16 does not hold
    tuned = {name: value + 0.01 * torch.randn_like(value) ** 3 for name, value in base.items()}
    tuned["v"][:3] = base["v"][:3]
    for name, tensors in (("base", base), ("tuned", tuned)):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
    return open_checkpoint(tmp_path / "base"), open_checkpoint(tmp_path / "tuned")


def decoded(packed: PackedTensor, name: str) -> torch.Tensor:
    delta = packed.decode(name)
    dense = torch.zeros(packed.numel)
    dense[torch.from_numpy(delta.indices).long()] = torch.from_numpy(delta.levels).float() * delta.scale  # type: ignore[union-attr]
    return dense.view(packed.shape)


@pytest.mark.parametrize("quantiser", QUANTISERS)
def test_tables_stand_for_entries(checkpoints: tuple[Checkpoint, Checkpoint], quantiser: Quantiser) -> None:
    """What is written, what gradients arrive, what is expected and what is packed, against the entries themselves."""
    base, tuned = checkpoints
    model = Small()
    student = SoftStudent(model, base, tuned, (), quantiser)
    assert student.tiny.keys() == {"b"}
    deltas = {name: tau for name, tau in deltas_between(base, tuned) if name != "b"}
    assert [int(row.sum()) for row in student.counts] == [int(tau.count_nonzero()) for tau in deltas.values()]
    student.write(student.centres)
    for row, (name, tau) in enumerate(deltas.items()):
        written = model.get_parameter(name).detach() - torch.from_numpy(base.tensors[name].read().copy())
        torch.testing.assert_close(written, tau, rtol=0, atol=0.51 * float(student.ranges.high[row].sum()) / CELLS * 2)
        assert not bool(written[tau == 0].any())
    weights = {name: torch.randn_like(tau) for name, tau in deltas.items()}
    sum((weights[name] * model.get_parameter(name)).sum() for name in deltas).backward()  # type: ignore[union-attr]
    assert all(parameter.grad is None for parameter in model.parameters())
    for row, (name, tau) in enumerate(deltas.items()):
        total = float(weights[name][tau != 0].sum())
        assert float(student.slopes[row].sum()) == pytest.approx(total, abs=1e-2)
        against = float((weights[name] * tau).sum())
        assert float((student.slopes[row] * student.centres[row]).sum()) == pytest.approx(against, abs=2e-2)
    mask = student.centres.abs() > 0.01
    levels, units = student.levels[:, 1], student.units[:, 1]
    packed = student.pack(mask, levels, units)
    student.write(torch.where(mask, levels * units[:, None], 0.0))
    for name in deltas:
        written = model.get_parameter(name).detach() - torch.from_numpy(base.tensors[name].read().copy())
        torch.testing.assert_close(written, decoded(packed[name], name), rtol=0, atol=1e-6)
    spent = sum(8 * item.nbytes for item in packed.values())
    assert spent == pytest.approx(student.expected_bits(mask, levels), rel=0.05, abs=400)


@torch.no_grad()
def test_it_starts_at_one_density_and_ends_with_what_is_stored(folders: tuple[Path, Path]) -> None:
    base, tuned = map(open_checkpoint, folders)
    model, tokenizer = load_model(folders[1])
    lessons = listen(model, tokenizer, PROMPTS)
    student = SoftStudent(model, base, tuned, (), Quantiser.SIGNED)
    room = 2000
    course = PaperCourse(student, lessons, room, Loss.KL)
    mask = hard_mask(student.centres, course._gates, student.ranges)
    found = (student.counts * mask).sum(1) / student.counts.sum(1)
    assert found.tolist() == pytest.approx([paper_course.START] * len(found), rel=0.15)
    course.choose(lambda: None)
    with torch.enable_grad():
        for step in range(4):
            course.step(step / 4)
    packed = course.finish()
    assert 0.97 * room < sum(item.nbytes for item in packed.values()) <= room
    for name, item in packed.items():
        expected = load_float32(base.tensors[name]) + decoded(item, name)
        assert torch.equal(model.get_parameter(name), expected.to(model.dtype)), name


@pytest.mark.parametrize("quantiser", ["signed", "paper"])
def test_it_is_a_recipe_of_compress(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantiser: Any
) -> None:
    monkeypatch.setattr(paper_course, "STEPS", 3)
    options: dict[str, Any] = {"codec": "flex-switch", "max_size": 17_000, "exemplars": PROMPTS}
    report = compress(*folders, tmp_path / "e", recipe="paper", quantiser=quantiser, **options)
    assert 0.9 * 17_000 < report.bytes <= 17_000
    said = read_header(tmp_path / "e").codec_params
    assert (said["recipe"], said["quantiser"], said["loss"]) == ("paper", quantiser, "kl")
    with pytest.raises(InvalidRequestError) as caught:
        compress(*folders, tmp_path / "e", recipe="mine", **options)  # type: ignore[arg-type]
    assert caught.value.param == "recipe"
