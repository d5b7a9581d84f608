"""`deploy/litellm.yaml` lets LiteLLM pass on all that clients ask of Switchyard."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.clients import fence
from tests.robustness.dummy_server import ROOT, dummy_server

pytest.importorskip("litellm")
KEY = "key-of-the-proxy"


def test_litellm_passes_everything_on(tmp_path: Path) -> None:
    with dummy_server(tmp_path, SWITCHYARD_API_KEYS=KEY, DUMMY_KEY=KEY) as server:
        said = subprocess.run(
            [sys.executable, "-m", "bench.clients.fence", "tests.clients.behind_litellm"],
            cwd=ROOT,
            env=fence.environment(PYTHONPATH=str(ROOT))
            | {"UPSTREAM_URL": f"{server.url}/v1", "SWITCHYARD_API_KEY": KEY},
            capture_output=True,
            text=True,
            check=False,
        )
    assert said.returncode == 0, said.stdout + said.stderr
    found = json.loads(said.stdout.splitlines()[-1])
    assert found["chat"][1] == "cron"
    assert len(found["chat"][0]) == 4
    assert len("".join(found["streamed"])) == 4
    assert found["mixed"] == {"cron": 0.5, "french": -0.25}
    assert found["text"][0].startswith("hi")
    assert found["text"][1] is None
    assert found["embedded"] == 2
    assert found["unknown"][0] == "NotFoundError"
    assert "there is no model or expert named 'nobody'" in found["unknown"][1]
    assert found["unsupported"][0] == "BadRequestError"
    assert "suffix" in found["unsupported"][1]
    assert found["general"] == {"master_key": "os.environ/LITELLM_MASTER_KEY"}, "no key is written down"
