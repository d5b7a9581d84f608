"""Settings: one place, and no accidental exposure."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from pydantic import ValidationError

from router.mix import MixMode
from router.settings import RouterSettings
from server.engine.options import EngineSettings
from server.settings import Settings


def test_the_engine_gets_its_part() -> None:
    assert Settings(base="b").engine() == EngineSettings()
    assert Settings(base="b", kv_bytes="2MiB", max_batch=3).engine() == EngineSettings(kv_bytes=2 << 20, max_batch=3)


def test_the_router_gets_its_part() -> None:
    assert Settings(base="b").router() == RouterSettings()
    given = Settings(base="b", router_mode="soft", router_neighbours=3).router()
    assert given == RouterSettings(mode=MixMode.SOFT, neighbours=3)


def test_every_setting_is_described() -> None:
    assert all(field.description for field in Settings.model_fields.values())
    assert {field.name for field in dataclasses.fields(EngineSettings)} <= Settings.model_fields.keys()


def test_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWITCHYARD_BASE", "folder/model.gguf")
    monkeypatch.setenv("SWITCHYARD_API_KEYS", " a, b,")
    monkeypatch.setenv("SWITCHYARD_MAX_UPLOAD_BYTES", "1.5MB")
    monkeypatch.setenv("SWITCHYARD_PORT", "")
    settings = Settings(max_n=2)
    assert {key.get_secret_value() for key in settings.api_keys} == {"a", "b"}
    assert (settings.served_base_name, settings.max_upload_bytes, settings.port) == ("model", 1_500_000, 8000)
    assert Settings(base_name="mine").served_base_name == "mine"


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_loopback_may_run_open(host: str) -> None:
    assert Settings(base="b", host=host).on_loopback


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.com", ""])
def test_anything_else_needs_keys(host: str) -> None:
    assert not Settings(base="b", host=host).may_run_open
    assert not Settings(base="b", host=host, api_keys="k").may_run_open
    assert not Settings(base="b", host=host, api_keys="k").on_loopback
    assert not Settings(base="b", host=host, allow_anonymous=True).on_loopback


def test_keys_may_come_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("one\n two, three\n")
    settings = Settings(base="b", api_keys="four", api_keys_file=file)
    assert {key.get_secret_value() for key in settings.api_keys} == {"one", "two", "three", "four"}
    assert not settings.may_run_open


@pytest.mark.parametrize("content", [None, b"", b" \n,", b"\xff"])
def test_a_file_without_a_key_does_not_open_the_server(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "keys"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValidationError, match="api_keys_file"):
        Settings(base="b", api_keys_file=file)


def test_keys_do_not_show() -> None:
    settings = Settings(base="b", api_keys="top-secret")
    assert "top-secret" not in repr(settings)
    with pytest.raises(ValidationError) as refusal:
        Settings(base="b", api_keys="top-secret", port="x")
    assert "top-secret" not in str(refusal.value)
