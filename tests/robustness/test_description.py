"""What `/openapi.json` promises holds: Schemathesis against a real server, every route, valid and invalid requests.

Of all checks, that valid requests are not refused is the one with exceptions: `BEYOND_A_SCHEMA` in `hooks.py` lists
them by route and parameter, with reasons.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.robustness.dummy_server import ROOT, dummy_server

HERE = Path(__file__).parent
KEY = "administrator-of-this-test"


@pytest.mark.parametrize(
    ("phases", "examples"),
    [
        ("coverage,fuzzing", 2),
        pytest.param("coverage,fuzzing,stateful", 50, marks=pytest.mark.slow),
    ],
)
def test_every_route_keeps_what_its_description_promises(tmp_path: Path, phases: str, examples: int) -> None:
    with dummy_server(tmp_path / "server", SWITCHYARD_API_KEYS=KEY, DUMMY_KEY=KEY) as server:
        described = httpx.get(f"{server.url}/openapi.json", headers={"Authorization": f"Bearer {KEY}"}).json()
        done = subprocess.run(
            [
                *(sys.executable, "-c", "from schemathesis.cli import schemathesis; schemathesis()"),
                *("--config-file", str(HERE / "schemathesis.toml"), "run", f"{server.url}/openapi.json"),
                *("--phases", phases, "--max-examples", str(examples), "--mode", "all", "--generation-deterministic"),
                *("--no-color", "--continue-on-failure", "--warnings", "off", "--suppress-health-check", "all"),
                *("--header", f"Authorization: Bearer {KEY}"),
            ],
            cwd=tmp_path,
            env=os.environ | {"SCHEMATHESIS_HOOKS": "tests.robustness.hooks", "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"Tested: {sum(map(len, described['paths'].values()))}\n" in done.stdout
