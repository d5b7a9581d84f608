"""`switchyard store` as a user types it."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.cli import main
from store.backends import ABSENT
from store.backends.disk import DiskStore
from store.backends.opening import open_ledger
from store.keys import Keys
from store.registry import Registry
from tests.store.builders import base_manifest, write_sample


def test_verify_and_migrate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = DiskStore(tmp_path / "a")
    registry = Registry(store, base_manifest(), frozenset())
    record, _ = registry.publish(write_sample(store.quarantine() / "upload"), name="cron")
    source, target = str(tmp_path / "a"), str(tmp_path / "b")
    assert _run("store", "migrate", source, target) == 0
    assert "1 experts copied, 0 were there already" in capsys.readouterr().out
    assert _run("store", "verify", target) == 0
    assert "1 experts checked: all is well" in capsys.readouterr().out
    registry.publish(write_sample(store.quarantine() / "upload", 1), name="gone")
    registry.remove("gone")
    assert _run("store", "verify", source) == 0
    assert "1 files belong to no expert" in capsys.readouterr().out
    assert _run("store", "gc", source, "--dry-run", "--grace", "0") == 0
    assert "1 of 1 files that no expert needs would go" in capsys.readouterr().out
    assert _run("store", "gc", source) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "s more 0 of 1 files that no expert needs are gone: 0.00 MB" in said
    assert len(store.blobs()) == 2
    assert _run("store", "gc", source, "--grace", "0") == 0
    assert store.blobs() == {record.digest}
    store.put_record("broken", b"{", expected=ABSENT)
    assert _run("store", "gc", source, "--grace", "0") == 1
    assert "a record is damaged" in capsys.readouterr().err
    store.delete_record("broken")
    capsys.readouterr()
    store.fetch(record.digest).unlink()
    store.close()
    assert _run("store", "verify", source) == 1
    said = capsys.readouterr()
    assert "cron: gone" in said.out
    assert "1 experts checked, 1 faults; try --repair" in said.err
    assert _run("store", "verify", str(Path(__file__).parent)) == 1
    assert "is not a store" in capsys.readouterr().err


def _run(*arguments: str) -> int:
    try:
        main(list(arguments))
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_keys_and_limits_come_along(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = str(tmp_path / "a"), str(tmp_path / "b")
    assert _run("keys", "create", "--tenant", "acme", "--store", source) == 0
    token = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("sy_"))
    DiskStore(tmp_path / "a").close()
    for copied in (1, 0):
        assert _run("store", "migrate", source, target) == 0
        assert ("1 API keys and limits" in capsys.readouterr().out) == bool(copied)
    ledger = open_ledger(target)
    found = Keys(ledger).find(token)
    assert found is not None
    assert found.tenant == "acme"
    ledger.close()
