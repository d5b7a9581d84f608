"""No secret is committed, and those that are planted are found."""

from __future__ import annotations

import secrets
from pathlib import Path

import pytest

from deploy.secret_scan import committed, main, secrets_in
from store.access import Role
from store.backends.disk_ledger import DiskLedger
from store.keys import Keys


def test_no_secret_is_committed() -> None:
    files = committed()
    assert len(files) > 500
    assert list(secrets_in(files)) == []


def test_a_key_of_this_server_is_found_everywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = Keys(DiskLedger(tmp_path / "ledger"))
    _, token = keys.create(tenant="a", roles=frozenset({Role.INFER}), by="test")
    planted = tmp_path / "tests" / "notes.md"
    planted.parent.mkdir()
    planted.write_text(f"Ask with\n`Authorization: Bearer {token}`.\n")
    assert main([str(planted)]) == 1
    assert capsys.readouterr().err == f"{planted}:2: Switchyard API Key\n"


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        (f'aws = "AKIA{"Q3EGUTA6FVN2LWKD"}"', "AWS Access Key"),
        (f'github = "ghp_{secrets.token_hex(18)}"', "GitHub Token"),
        (f"-----BEGIN OPENSSH {'PRIVATE'} KEY-----", "Private Key"),
        (f"redis_url: redis://operator:{secrets.token_hex(8)}@cache/0", "Basic Auth Credentials"),
    ],
)
def test_what_others_give_out_is_found(line: str, kind: str, tmp_path: Path) -> None:
    planted = tmp_path / "test_settings.py"
    planted.write_text(f"{line}\n")
    assert list(secrets_in([planted])) == [f"{planted}:1: {kind}"]


def test_passwords_count_outside_of_tests(tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    for name in ("settings.yaml", "tests/settings.yaml"):
        (tmp_path / name).write_text(f'password: "{secrets.token_hex(8)}"\n')
    files = [tmp_path / "settings.yaml", tmp_path / "tests/settings.yaml"]
    assert list(secrets_in(files)) == [f"{files[0]}:1: Secret Keyword"]
