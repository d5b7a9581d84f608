"""The audit log: appended to by many, read from its end, and never rewritten."""

from __future__ import annotations

import json
import stat
import threading
from pathlib import Path

import pytest

from server import audit
from server.audit import AuditEntry, AuditLog


def entry(i: int, **more: str) -> AuditEntry:
    return AuditEntry("expert.publish", f"expert-{i}", "key", "acme", "done", details=more)


def test_entries_come_back_the_latest_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "_BLOCK", 100)  # lines span blocks
    log = AuditLog(tmp_path / "audit.jsonl")
    assert log.latest(10, {}) == []
    for i in range(20):
        log.write(entry(i, digest="ü" * i))
    found = log.latest(5, {})
    assert [one["target"] for one in found] == [f"expert-{i}" for i in (19, 18, 17, 16, 15)]
    assert found[0]["details"] == {"digest": "ü" * 19}
    assert len(log.latest(100, {})) == 20
    assert [one["target"] for one in log.latest(100, {"target": "expert-0"})] == ["expert-0"]
    assert log.latest(100, {"target": "expert-0", "key": "other"}) == []
    assert stat.S_IMODE((tmp_path / "audit.jsonl").stat().st_mode) == 0o600


def test_half_a_line_hides_no_other(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit.jsonl")
    log.write(entry(1))
    with (tmp_path / "audit.jsonl").open("ab") as file:
        file.write(b'{"half\n')
    log.write(entry(2))
    assert [one["target"] for one in log.latest(10, {})] == ["expert-2", "expert-1"]


def test_many_writers_and_a_file_that_is_moved_away(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    logs = [AuditLog(path), AuditLog(path)]
    threads = [threading.Thread(target=lambda log=log: [log.write(entry(i)) for i in range(20)]) for log in logs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len([json.loads(line) for line in path.read_text().splitlines()]) == 40
    path.rename(tmp_path / "audit.jsonl.1")
    logs[0].write(entry(99))
    assert [one["target"] for one in logs[1].latest(10, {})] == ["expert-99"]
