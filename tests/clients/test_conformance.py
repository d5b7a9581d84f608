"""Every client that people have, unmodified, does what the committed matrix says that it does."""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError

import pytest

from bench.bars import load
from bench.clients.features import FEATURES
from bench.clients.run import CLIENTS, check, version_of
from bench.clients.target import Target
from bench.conformance import verdict
from store.errors import MissingPackageError


@pytest.mark.parametrize("client", CLIENTS)
def test_a_client_does_what_the_matrix_says(client: str, target: Target) -> None:
    found = _checked(client, target)
    committed = {row["feature"]: row[client] for row in load("conformance")["rows"][1:]}
    assert {feature.id: verdict(feature, found) for feature in FEATURES} == committed, "run python -m bench.conformance"
    assert set(found) <= {feature.id for feature in FEATURES}


def _checked(client: str, target: Target) -> dict[str, str | None]:
    try:
        version_of(client)
        return check(client, target)
    except (MissingPackageError, PackageNotFoundError) as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"{client} is not installed here: {error}")
