"""Dockerfile, compose files, Makefile and pages against the project; and each check against a copy that is broken."""

from __future__ import annotations

import shutil
import threading
import tomllib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from deploy import healthcheck, reference
from deploy.pins import needed
from deploy.tables import COPIES, PAGES, rewritten
from deploy.tables import ROOMS as TABLE_ROOMS
from server.settings import Settings
from tests.deploy.breakages import BREAKAGES, Edit
from tests.deploy.checks import CHECKS, Check
from tests.deploy.imports import sources
from tests.deploy.project import Project

ROOT = Path(__file__).resolve().parent.parent.parent
SMALL = (
    "Dockerfile", ".dockerignore", "docker-compose.yml", ".env.example", "Makefile", ".ci", "deploy", "pyproject.toml",
    "constraints.txt", "README.md", "LICENSE", "CONTRIBUTING.md", "docs", "examples/README.md", ".gitignore",
)  # fmt: skip


@pytest.fixture
def copy(tmp_path: Path) -> Project:
    """A copy of all that the checks read."""
    for name in SMALL:
        source, target = ROOT / name, tmp_path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
    for name in ("server", "store", "router"):
        (tmp_path / name).mkdir()
    return Project(tmp_path)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_project_keeps_to_it(check: Check) -> None:
    assert list(check(Project(ROOT))) == []


@pytest.mark.parametrize(
    ("check", "edit"),
    [(check, edit) for check, edits in BREAKAGES.items() for edit in edits],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_every_check_can_fail(copy: Project, check: Check, edit: Edit) -> None:
    file, old, new, fault = edit
    path = copy.root / file
    text = path.read_text(encoding="utf-8")
    assert old in text, "the test breaks nothing"
    path.write_text(text.replace(old, new), encoding="utf-8")
    found = "\n".join(check(Project(copy.root)))
    assert fault in found, found or "the check has found nothing"


def test_every_check_is_tested() -> None:
    assert BREAKAGES.keys() == set(CHECKS)


def test_empty_variables_of_compose_leave_the_defaults(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    secret = tmp_path / "admin_key"
    secret.write_text("key")
    monkeypatch.setenv("SWITCHYARD_API_KEYS_FILE", str(secret))
    for name, value in Project(ROOT).compose["services"]["server"]["environment"].items():
        if name != "SWITCHYARD_API_KEYS_FILE":
            monkeypatch.setenv(name, value)
    settings = Settings()  # type: ignore[call-arg]
    assert settings.threads is None
    assert settings.kv_bytes == Settings.model_fields["kv_bytes"].default


@pytest.mark.parametrize("page", PAGES)
def test_tables_say_what_the_code_says(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert "written by make docs" in text
    assert rewritten(text) == text, "run: make docs"


@pytest.mark.parametrize("page", reference.PAGES)
def test_the_reference_says_what_the_code_says(page: str) -> None:
    assert (ROOT / page).read_text(encoding="utf-8") == reference.PAGES[page](), "run: make docs"


def test_copies_are_copies() -> None:
    for original, copied in COPIES.items():
        assert (ROOT / original).read_bytes() == (ROOT / copied).read_bytes(), "run: make docs"


def test_the_tables_know_every_folder_of_the_code() -> None:
    assert {str(path.parent.relative_to(ROOT)) for path in sources(ROOT).values()} == set(TABLE_ROOMS)


def test_constraints_pin_everything_that_is_needed() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert needed("switchyard[dev,examples]") <= pins.keys(), "run: make pins"
    project = Project(ROOT)
    assert all("+" not in version for version in pins.values())
    for wanted in map(Requirement, _requirements(project)):
        assert wanted.specifier.contains(pins[canonicalize_name(wanted.name)]), wanted


def test_the_hooks_of_pre_commit_fetch_nothing() -> None:
    repos = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    assert [repo["repo"] for repo in repos] == ["local"]
    assert {hook["language"] for hook in repos[0]["hooks"]} == {"system", "pygrep"}
    assert {hook["id"] for hook in repos[0]["hooks"]} >= {"ruff-check", "ruff-format", "mypy"}


@pytest.fixture
def answering() -> Iterator[HTTPServer]:
    """A server whose one answer has the status `status`."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(self.server.status if self.path == "/ready" else 404)  # type: ignore[attr-defined]
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(("status", "result"), [(200, 0), (503, 1)])
def test_the_health_check_asks_whether_the_server_is_ready(
    answering: HTTPServer, monkeypatch: pytest.MonkeyPatch, status: int, result: int
) -> None:
    answering.status = status  # type: ignore[attr-defined]
    monkeypatch.setenv("SWITCHYARD_PORT", str(answering.server_port))
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert healthcheck.main() == result


def test_the_health_check_fails_where_nothing_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWITCHYARD_PORT", "9")
    assert healthcheck.main() == 1


def _requirements(project: Project) -> list[str]:
    table = tomllib.loads(project.text("pyproject.toml"))["project"]
    return [*table["dependencies"], *(wanted for extra in table["optional-dependencies"].values() for wanted in extra)]
