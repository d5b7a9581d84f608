"""The order of the rooms (docs/architecture.md): api → generation → engine, router, registry → store → nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.deploy.imports import MAY_IMPORT, ROOMS, faults, sources, ways_to

ROOT = Path(__file__).resolve().parent.parent.parent
HEAVY = frozenset({"torch", "transformers", "tokenizers", "safetensors"})


def test_no_import_runs_the_other_way() -> None:
    assert faults(ROOT) == []


def test_the_http_surface_stands_without_torch() -> None:
    assert ways_to(ROOT, "server.api", HEAVY) == []
    assert ways_to(ROOT, "server.app", HEAVY) == []


def test_most_of_the_store_stands_without_torch() -> None:
    """What looks at strangers' files must not need a library that can run what is in them."""
    for module in ("store.expert_file", "store.registry", "store.backends"):
        assert ways_to(ROOT, module, HEAVY) == []


def test_every_rule_is_of_use() -> None:
    modules = sources(ROOT)
    assert all(any(module == name or module.startswith(f"{name}.") for module in modules) for name in MAY_IMPORT)
    for name, allowed in MAY_IMPORT.items():
        assert all(other in modules for other in allowed), name


def test_there_is_no_utils() -> None:
    assert not [
        name for name in sources(ROOT) if name.rsplit(".", 1)[-1] in ("utils", "util", "helpers", "common", "misc")
    ]


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("store/registry.py", "from router.router import Router"),
        ("store/registry.py", "import server.settings"),
        ("router/router.py", "from server.engine.types import Engine"),
        ("router/router.py", "from store.registry import Registry"),
        ("server/engine/engine.py", "from server.generation import Generation"),
        ("server/engine/engine.py", "from store import registry"),
        ("server/generation.py", "from server.api import errors"),
        ("server/generation.py", "def f():\n    from server.engine import engine"),
        ("server/api/chat.py", "from server.engine.engine import TransformersEngine"),
        ("server/api/chat.py", "from server.serving import serve"),
        ("server/app.py", "import bench.bars"),
        ("store/registry.py", "from tests.tiny import save_base"),
    ],
)
def test_a_wrong_import_is_found(tmp_path: Path, module: str, line: str) -> None:
    _tree(tmp_path, {module: line})
    assert len(faults(tmp_path)) == 1


def test_a_way_to_torch_is_found(tmp_path: Path) -> None:
    late = "def f():\n    import torch\n"
    _tree(tmp_path, {"server/api/chat.py": "from server.generation import Request", "server/generation.py": late})
    assert ways_to(tmp_path, "server.api", HEAVY) == []
    (tmp_path / "server/generation.py").write_text("import torch.nn\n", encoding="utf-8")
    assert ways_to(tmp_path, "server.api", HEAVY) == ["server.api.chat → server.generation → torch.nn"]


def _tree(root: Path, texts: dict[str, str]) -> None:
    """The project's modules, empty but for these."""
    for path in sources(ROOT).values():
        copy = root / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.touch()
    for name, text in texts.items():
        (root / name).write_text(text + "\n", encoding="utf-8")
    assert {path.name for path in root.iterdir()} == set(ROOMS)
