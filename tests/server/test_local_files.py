"""Files that clients may name: inside allowed folders, whatever links and races say."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from server.local_files import LocalFiles
from store.errors import NotFoundError


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """`allowed/one` is an adapter; `secret` lies beside the allowed folder."""
    (tmp_path / "allowed/one").mkdir(parents=True)
    (tmp_path / "secret").mkdir()
    for folder in ("allowed/one", "secret"):
        (tmp_path / folder / "adapter_model.safetensors").write_bytes(folder.encode())
        (tmp_path / folder / "adapter_config.json").write_text("{}")
        (tmp_path / folder / "README.md").write_text("not wanted")
    return tmp_path


@pytest.fixture
def files(world: Path) -> LocalFiles:
    return LocalFiles([world / "allowed"])


def test_what_makes_up_an_adapter_is_copied(files: LocalFiles, world: Path) -> None:
    parts = files.parts(str(world / "allowed/one"))
    assert list(parts) == ["adapter_config.json", "adapter_model.safetensors"]
    assert parts["adapter_model.safetensors"](world / "copy") == len(b"allowed/one")
    assert (world / "copy").read_bytes() == b"allowed/one"
    assert list(files.parts(str(world / "allowed/one/adapter_model.safetensors"))) == ["adapter_model.safetensors"]
    assert files
    assert not LocalFiles([])


@pytest.mark.parametrize(
    "path",
    ["{0}/secret", "{0}/allowed/../secret", "{0}/allowed/link", "{0}/allowed/nothing", "{0}/allowed2", "one", "", "/",
     "{0}/allowed/one/README.md", "{0}/allowed", "{0}/allowed/one\0", "{0}/allowed/" + 5000 * "x"],
)  # fmt: skip
def test_all_else_is_not_there(files: LocalFiles, world: Path, path: str) -> None:
    (world / "allowed/link").symlink_to(world / "secret")
    (world / "allowed2").mkdir()
    (world / "allowed2/adapter_model.safetensors").write_bytes(b"x")
    with pytest.raises(NotFoundError) as refusal:
        files.parts(path.format(world))
    assert refusal.value.param == "lora_path"


def test_a_link_to_a_file_outside_is_not_followed(files: LocalFiles, world: Path) -> None:
    link = world / "allowed/one/more.safetensors"
    link.symlink_to(world / "secret/adapter_model.safetensors")
    parts = files.parts(str(world / "allowed/one"))
    with pytest.raises(NotFoundError):
        parts["more.safetensors"](world / "copy")
    assert not (world / "copy").exists()
    with pytest.raises(NotFoundError):
        files.parts(str(link))


def test_a_path_that_comes_to_lead_elsewhere_is_noticed(files: LocalFiles, world: Path) -> None:
    parts = files.parts(str(world / "allowed/one"))
    (world / "allowed/one").rename(world / "allowed/moved")
    (world / "allowed/one").symlink_to(world / "secret")
    with pytest.raises(NotFoundError):
        parts["adapter_model.safetensors"](world / "copy")


def test_a_pipe_hangs_nobody(files: LocalFiles, world: Path) -> None:
    os.mkfifo(world / "allowed/one/pipe.safetensors")
    with pytest.raises(NotFoundError):
        files.parts(str(world / "allowed/one"))["pipe.safetensors"](world / "copy")


def test_the_folder_itself_may_be_a_link(world: Path) -> None:
    (world / "models").symlink_to(world / "allowed")
    files = LocalFiles([world / "models"])
    assert files.parts(str(world / "models/one"))
    assert files.parts(str(world / "allowed/one"))
