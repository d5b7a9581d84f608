"""The HTTP surface stands without torch."""

from __future__ import annotations

import subprocess
import sys


def test_no_torch() -> None:
    code = "import sys, server.app; print([name for name in ('torch', 'transformers') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
