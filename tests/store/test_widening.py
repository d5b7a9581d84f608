"""Below the floor: refused, or made again with more room, and said so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from server.api.compress_options import CompressOptions
from store import widening
from store.convert import compress
from store.errors import InvalidRequestError
from store.expert_file import read_header
from store.widening import TRIES, compress_widening
from tests.tiny import save_base, save_tuned


def test_an_expert_below_the_floor_is_not_written(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    tuned = save_tuned(base, tmp_path / "tuned")
    with pytest.raises(InvalidRequestError, match="max_kl allows") as caught:
        compress(base, tuned, tmp_path / "e", density=0.02, exemplars=["a river", "a house"], max_kl=1e-9)
    assert caught.value.code == "below_floor"
    assert not (tmp_path / "e").exists()


def test_the_density_grows_until_the_floor_is_met(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The floor is met at a density of 0.08."""
    base = save_base(tmp_path / "base")
    tuned = save_tuned(base, tmp_path / "tuned")

    def until(*folders: Path, density: float, **given: Any) -> Any:
        if density < 0.08:
            raise InvalidRequestError("it would be far away, and that is too much", param="max_kl", code="below_floor")
        return compress(*folders, density=density, **given)

    monkeypatch.setattr(widening, "compress", until)
    report = compress_widening(base, tuned, tmp_path / "e", density=0.02)
    assert report.widened == ("density=0.02: it would be far away", "density=0.04: it would be far away")
    assert report.density == pytest.approx(0.08, abs=0.01)
    assert read_header(tmp_path / "e").codec_params == {
        "density": 0.08, "knob": "l1", "widened": "density=0.02, density=0.04",
    }  # fmt: skip
    assert compress_widening(base, tuned, tmp_path / "e", density=0.08).widened == ()
    assert "widened" not in read_header(tmp_path / "e").codec_params


def test_the_header_of_a_budget_has_room_for_what_was_tried(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    tuned = save_tuned(base, tmp_path / "tuned")
    tried = [f"max_size={size}" for size in (1000, 2000, 4000, 8000)]
    options: dict[str, Any] = {"codec": "flex-switch", "exemplars": ["a river", "a house"], "max_size": 16000}
    report = compress(base, tuned, tmp_path / "e", **options, widened=tried)
    assert report.bytes <= 16000
    assert read_header(tmp_path / "e").codec_params["widened"] == ", ".join(tried)


def test_an_adapter_s_own_factors_have_nothing_to_widen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    seen: list[int | None] = []

    def never(*_: Path, rank: int | None = None, **__: Any) -> None:
        seen.append(rank)
        raise InvalidRequestError("too far away, as ever", param="max_kl", code="below_floor")

    monkeypatch.setattr(widening, "compress", never)
    for given in ({}, {"rank": 40000}):
        with pytest.raises(InvalidRequestError, match="too far away"):
            compress_widening(tmp_path, tmp_path, tmp_path, codec="low-rank", **given)
    assert seen == [None, 40000, 65536]


def test_what_is_said_of_the_tries_is_true() -> None:
    assert "five tries in all" in str(CompressOptions.model_fields["widen"].description)
    assert TRIES == 5


@pytest.mark.parametrize(
    ("options", "asked"),
    [
        ({"density": 0.3}, [0.3, 0.6, 1.0]),
        ({"codec": "compeft"}, [0.05, 0.1, 0.2, 0.4, 0.8]),
        ({"codec": "flex-switch"}, [0.04, 0.08, 0.16, 0.32, 0.64]),
        ({"codec": "flex-switch", "max_size": 10}, [10, 20, 40, 80, 160]),
        ({"codec": "flex-switch", "bits_per_param": 0.2}, [0.2, 0.4, 0.8, 1.5]),
        ({"codec": "flex-switch", "bits_per_param": 1.5}, [1.5]),
        ({"codec": "low-rank"}, [8, 16, 32, 64, 128]),
        ({"codec": "low-rank", "rank": 40000}, [40000, 65536]),
        ({"codec": "bit-delta"}, [None]),
    ],
)
def test_what_is_widened_and_how_often(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, options: dict[str, Any], asked: list[float | None]
) -> None:
    seen: list[float | None] = []
    key = "density"
    if options.get("codec") == "flex-switch":
        key = "max_size" if "max_size" in options else "bits_per_param"
    elif options.get("codec") == "low-rank":
        key = "rank"
    density = None if options.get("codec") == "bit-delta" else 0.05
    defaults = {"density": density, "bits_per_param": 0.04, "rank": 8}

    def never(*_: Path, **given: Any) -> None:
        seen.append(given.get(key, defaults.get(key)))
        raise InvalidRequestError("too far away, as ever", param="max_kl", code="below_floor")

    monkeypatch.setattr(widening, "compress", never)
    with pytest.raises(InvalidRequestError) as caught:
        compress_widening(tmp_path, tmp_path, tmp_path, **options)
    assert (caught.value.code, caught.value.param) == ("below_floor", "max_kl")
    assert seen == asked
    assert len(seen) <= TRIES


def test_other_errors_pass(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*_: Path, **__: Any) -> None:
        raise InvalidRequestError("no", param="codec")

    monkeypatch.setattr(widening, "compress", fail)
    with pytest.raises(InvalidRequestError, match="no"):
        compress_widening(tmp_path, tmp_path, tmp_path)
