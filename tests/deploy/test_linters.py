"""The deployment's files by tools of other people: parsers, schemas and linters that know each kind of file."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import dockerfile
import promql_parser
import pytest
import yaml

from tests.deploy.project import Project

ROOT = Path(__file__).resolve().parents[2]
UNIT = ROOT / "deploy/systemd/switchyard.service"
SYSTEMD = shutil.which("systemd-analyze")


def run(*command: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, check=False)


def validated(path: Path) -> subprocess.CompletedProcess[str]:
    """What the schema of the Compose Specification says of a file."""
    return run(sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", path)


def test_compose_keeps_to_its_specification(tmp_path: Path) -> None:
    good = validated(ROOT / "docker-compose.yml")
    assert good.returncode == 0, good.stdout
    text = (ROOT / "docker-compose.yml").read_text(encoding="utf-8")
    broken = tmp_path / "docker-compose.yml"
    broken.write_text(text.replace("read_only: true\n  cap_drop", "readonly: true\n  cap_drop"), encoding="utf-8")
    assert "readonly" in validated(broken).stdout


@pytest.fixture(scope="module")
def instructions() -> list[Any]:
    return list(dockerfile.parse_file(str(ROOT / "Dockerfile")))


def test_docker_reads_the_dockerfile_as_our_checks_do(instructions: list[Any]) -> None:
    ours = Project(ROOT).dockerfile
    assert [instruction.cmd.upper() for instruction in instructions] == [instruction.name for instruction in ours]


def test_the_dockerfile_s_images_are_versions(instructions: list[Any]) -> None:
    images = [instruction.value[0] for instruction in instructions if instruction.cmd.upper() == "FROM"]
    foreign = [image for image in images if "${VARIANT}" not in image]  # the others are stages of this file
    assert len(foreign) == 2
    for image in foreign:
        assert re.search(r":[\w.-]*\d+\.\d+", image), f"{image} is whatever is newest"


def test_the_dockerfile_leaves_nothing_behind(instructions: list[Any]) -> None:
    runs = [" ".join(instruction.value) for instruction in instructions if instruction.cmd.upper() == "RUN"]
    installing = [run for run in runs if "apt-get install" in run]
    assert installing
    for run_ in installing:
        assert "--no-install-recommends" in run_
        assert "rm -rf /var/lib/apt/lists/*" in run_
    commands = [instruction.cmd.upper() for instruction in instructions]
    assert commands.count("HEALTHCHECK") == 1
    assert commands.index("USER") > max(i for i, command in enumerate(commands) if command in ("RUN", "COPY"))


@pytest.mark.skipif(SYSTEMD is None, reason="there is no systemd-analyze here")
class TestSystemd:
    """systemd's own verdict; it wants the executable to be there, so another one stands in."""

    @pytest.fixture
    def unit(self, tmp_path: Path) -> Path:
        text = UNIT.read_text(encoding="utf-8").replace("/opt/switchyard/bin/switchyard", "/bin/true")
        (tmp_path / UNIT.name).write_text(text, encoding="utf-8")
        return tmp_path / UNIT.name

    def test_the_unit_is_sound(self, unit: Path) -> None:
        done = run("systemd-analyze", "verify", "--man=no", unit)
        assert (done.returncode, done.stderr) == (0, "")
        drop_in = unit.with_name(f"{unit.name}.d")
        drop_in.mkdir()
        shutil.copy(UNIT.with_name("gpu.conf"), drop_in)
        done = run("systemd-analyze", "verify", "--man=no", unit)
        assert (done.returncode, done.stderr) == (0, "")

    def test_an_unsound_unit_is_told(self, unit: Path) -> None:
        unit.write_text(unit.read_text().replace("TimeoutStopSec=130", "TimeoutStopSec=soon\nTimeoutStop=3"))
        assert "TimeoutStop" in run("systemd-analyze", "verify", "--man=no", unit).stderr

    def test_the_unit_exposes_little(self, unit: Path) -> None:
        command = ("systemd-analyze", "security", "--offline=true", "--no-pager")
        done = run(*command, "--threshold=15", unit)
        assert done.returncode == 0, done.stdout
        unit.write_text(unit.read_text().replace("ProtectSystem=strict", "").replace("DynamicUser=yes", "User=root"))
        assert run(*command, "--threshold=15", unit).returncode != 0


def test_prometheus_reads_every_alert() -> None:
    groups = yaml.safe_load((ROOT / "deploy/monitoring/alerts.yml").read_text(encoding="utf-8"))["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert rules
    for rule in rules:
        promql_parser.parse(rule["expr"])
    with pytest.raises(ValueError, match="parenthesis"):
        promql_parser.parse("sum by (instance (up)")
