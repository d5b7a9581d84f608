"""What the tests of several rooms share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.zygote import Zygote, clean_environment

if not any(Path("/dev").glob("nvidia[0-9]*")):
    # Triton reads it when it is first imported, by whomever.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    forking = Zygote(clean_environment())
    yield forking
    forking.close()
