"""What the tests of several rooms share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.zygote import Zygote, clean_environment


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    forking = Zygote(clean_environment())
    yield forking
    forking.close()
