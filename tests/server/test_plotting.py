from __future__ import annotations

import builtins
from pathlib import Path

import numpy as np
import pytest

from server.cli import main
from server.plotting import by_layer
from store.expert_file import read_header
from tests.store.builders import SHAPES, packed_newer, write_sample


def run(*words: str) -> int:
    try:
        main(list(words))
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_where_the_bits_are(tmp_path: Path) -> None:
    path = write_sample(tmp_path / "e")
    layers, modules, density, bits = by_layer(path)
    assert layers == ["0", "1", "outside"]
    assert modules == ["norm", "mlp", "embed"]
    entry = read_header(path).tensors["layers.0.mlp.weight"]
    assert density[0, 1] == pytest.approx(entry.nnz / entry.numel)  # type: ignore[union-attr]
    assert bits[0, 0] == 16.0
    assert np.isnan(density[1, 0])
    header = read_header(path)
    numel = {name: int(np.prod(shape)) for name, shape in SHAPES.items()}
    places = {"layers.0.mlp.weight": (0, 1), "layers.0.norm.weight": (0, 0), "layers.1.mlp.weight": (1, 1),
              "embed.weight": (2, 2)}  # fmt: skip
    total = sum(bits[places[name]] * numel[name] for name in header.tensors)
    assert total / sum(numel.values()) == pytest.approx(header.bits_per_param)


def test_the_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = write_sample(tmp_path / "e", tensors=packed_newer(1))
    assert run("inspect", str(path), "--plot", str(tmp_path / "e.png")) == 0
    assert (tmp_path / "e.png").read_bytes().startswith(b"\x89PNG")
    assert run("inspect", str(path), "--plot", str(tmp_path / "gone" / "e.png")) == 1


def test_without_matplotlib(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    importing = builtins.__import__

    def refuse(name: str, *args: object, **options: object) -> object:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return importing(name, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", refuse)
    assert run("inspect", str(write_sample(tmp_path / "e")), "--plot", str(tmp_path / "e.png")) == 1
    assert "pip install 'switchyard[plots]'" in " ".join(capsys.readouterr().err.split())
