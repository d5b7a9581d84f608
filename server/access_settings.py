"""What settings say about who may reach a server: its address, and files of keys. Has no settings of its own."""

from __future__ import annotations

import ipaddress
from pathlib import Path

from pydantic import SecretStr


def is_loopback(host: str) -> bool:
    """Whether a host name or address, as written, can only mean this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def keys_in(path: Path) -> frozenset[SecretStr]:
    """The API keys of a file, such as one that an orchestrator mounts: one a line, or separated by commas.

    Raises:
        ValueError: the file cannot be read, or holds no key. An empty file must not open a server.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"api_keys_file {path} cannot be read: {error}") from error
    keys = frozenset(SecretStr(word) for word in text.replace(",", " ").split())
    if not keys:
        raise ValueError(f"api_keys_file {path} holds no key")
    return keys
