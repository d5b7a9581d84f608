"""One live server for the checks of all clients."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bench.clients.target import Target
from bench.clients.world import live, make_tiny


@pytest.fixture(scope="session")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    folder = tmp_path_factory.mktemp("clients")
    with live(folder, make_tiny(folder)) as found:
        yield found
