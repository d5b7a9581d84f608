"""Where a server may listen without keys, and that it says so."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from server.exposure import check_exposure
from server.settings import Settings
from store.access import Role
from store.backends.disk_ledger import DiskLedger
from store.errors import InvalidRequestError
from store.keys import Keys


def check(keys: Keys, **settings: object) -> str:
    out = Console(file=io.StringIO(), width=200)
    check_exposure(Settings.model_validate({"base": "b", **settings}), keys, out)
    assert isinstance(out.file, io.StringIO)
    return out.file.getvalue()


def test_exposure(tmp_path: Path) -> None:
    ledger = DiskLedger(tmp_path)
    keys = Keys(ledger)
    assert "runs open" in check(keys)
    assert "who can reach 0.0.0.0" in check(keys, host="0.0.0.0", allow_anonymous=True)
    with pytest.raises(InvalidRequestError, match="without API keys"):
        check(keys, host="0.0.0.0")
    assert not check(keys, host="0.0.0.0", api_keys="k")
    key, _ = keys.create(tenant=None, roles=frozenset({Role.ADMIN}), by="test")
    assert not check(keys, host="0.0.0.0")
    keys.revoke(key.id)
    assert not check(keys)
    ledger.close()
