"""`switchyard keygen` and `switchyard sign`: keys in OpenSSH's own formats, so that ssh-keygen's serve as well."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from store.errors import InvalidRequestError, StoreError
from store.expert_file import digest_of, read_header
from store.signature import SUFFIX, Signature, missing, sign

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey


def make_key(path: Path, name: str) -> str:
    """Write a new private key, for its owner's eyes only, and its public half to `path`.pub. Returns that.

    Raises:
        InvalidRequestError: a file is there already.
        StoreError: they cannot be written.
        MissingPackageError: the extra `signing` is not installed.
    """
    try:
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
        from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
    except ImportError:
        raise missing() from None
    if name != " ".join(name.split()) or "," in name or not name.isprintable():
        raise InvalidRequestError("the name must be one line without commas", param="name")
    key = Ed25519PrivateKey.generate()
    secret = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    line = f"{key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()} {name}".rstrip()
    _write_new(path, secret, 0o600)
    _write_new(path.with_name(path.name + ".pub"), f"{line}\n".encode(), 0o644)
    return line


def sign_file(file: Path, key: Path, passphrase: Callable[[], str]) -> tuple[Path, Signature]:
    """Write the signature of an expert file beside it. Returns where, and it.

    Args:
        key: an OpenSSH or PEM private key.
        passphrase: asked for it, where the key has one.

    Raises:
        ExpertFileError: the file is no expert file.
        InvalidRequestError: the key is no ed25519 key, or the passphrase is wrong.
        StoreError: a file cannot be read or written.
        MissingPackageError: the extra `signing` is not installed.
    """
    read_header(file)
    signature = sign(digest_of(file), load_key(key, passphrase))
    beside = file.with_name(file.name + SUFFIX)
    try:
        beside.write_text(f"{signature}\n", encoding="ascii")
    except OSError as error:
        raise StoreError(f"cannot write {beside}: {error.strerror}") from None
    return beside, signature


def load_key(path: Path, passphrase: Callable[[], str]) -> Ed25519PrivateKey:
    """Read a private key; see `sign_file`."""
    try:
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
        from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_ssh_private_key
    except ImportError:
        raise missing() from None
    try:
        data = path.read_bytes()
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error.strerror}") from None
    load = load_ssh_private_key if b"OPENSSH PRIVATE KEY" in data else load_pem_private_key
    try:
        try:
            key = load(data, None)
        except TypeError:  # it has a passphrase
            key = load(data, passphrase().encode())
    except (ValueError, UnsupportedAlgorithm) as error:
        raise InvalidRequestError(f"{path} is no key, or the passphrase is wrong: {error}", param="key") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise InvalidRequestError(f"{path} is no ed25519 key: make one (switchyard keygen)", param="key")
    return key


def _write_new(path: Path, data: bytes, mode: int) -> None:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    except FileExistsError:
        raise InvalidRequestError(f"{path} is there already; choose another name", param="file") from None
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error.strerror}") from None
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
