"""Signatures of expert files: ed25519 over the digest. docs/expert-file.md, section 7, specifies both."""

from __future__ import annotations

import base64
import binascii
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from store.errors import MissingPackageError, SignatureError, StoreError
from store.expert_info import DIGEST_PATTERN

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

SUFFIX = ".sig"
"""A file's signature stands beside it, under its name and this."""
MAX_BYTES = 200
_ALGORITHM = "ed25519"
_KEY_BYTES, _VALUE_BYTES = 32, 64


@dataclass(frozen=True)
class Signature:
    """Who signed, and what came out.

    Attributes:
        key: the public key, 32 bytes.
        value: the signature, 64 bytes.
    """

    key: bytes
    value: bytes

    def __str__(self) -> str:
        return " ".join((_ALGORITHM, base64.b64encode(self.key).decode(), base64.b64encode(self.value).decode()))

    def fits(self, digest: str) -> bool:
        """Whether the key's owner has signed the file of that digest.

        Raises:
            MissingPackageError: nothing can be checked here.
        """
        try:
            from cryptography.exceptions import InvalidSignature
            from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
        except ImportError:
            raise missing() from None
        try:
            Ed25519PublicKey.from_public_bytes(self.key).verify(self.value, _message(digest))
        except (InvalidSignature, ValueError):
            return False
        return True


def parse_signature(text: str) -> Signature:
    """Read a signature as it stands in a `.sig` file.

    Raises:
        SignatureError: it is none.
    """
    words = text.removesuffix("\n").split(" ")
    if len(text) > MAX_BYTES or len(words) != 3 or words[0] != _ALGORITHM:
        raise SignatureError("this is no signature: expected one line, `ed25519 KEY SIGNATURE`, both in base64")
    try:
        key, value = (base64.b64decode(word, validate=True) for word in words[1:])
    except (binascii.Error, ValueError):
        raise SignatureError("the signature is not base64") from None
    if (len(key), len(value)) != (_KEY_BYTES, _VALUE_BYTES):
        raise SignatureError(f"a key has {_KEY_BYTES} bytes and a signature {_VALUE_BYTES}")
    return Signature(key, value)


def sign(digest: str, key: Ed25519PrivateKey) -> Signature:
    """Sign the file of that digest."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    public = key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
    return Signature(public, key.sign(_message(digest)))


def read_beside(file: Path) -> str | None:
    """The signature that stands beside a file, as text; None where there is none.

    Raises:
        SignatureError: it is longer than any signature, or no text.
        StoreError: it cannot be read.
    """
    try:
        with file.with_name(file.name + SUFFIX).open("rb") as beside:
            data = beside.read(MAX_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StoreError(f"cannot read the signature of {file.name}: {error.strerror}") from None
    return decode_signature(data)


def decode_signature(data: bytes) -> str:
    """A signature's bytes as text, checked to be one.

    Raises:
        SignatureError: they are none.
    """
    try:
        text = data.decode("ascii")
    except UnicodeDecodeError:
        raise SignatureError("the signature is not ASCII text") from None
    return str(parse_signature(text))


def fingerprint(key: bytes) -> str:
    """A public key in short, as `ssh-keygen -l` shows it."""
    name = b"ssh-ed25519"
    blob = b"".join(len(part).to_bytes(4, "big") + part for part in (name, key))
    return "SHA256:" + base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip("=")


def missing() -> MissingPackageError:
    """For whoever needs what only the extra `signing` brings."""
    return MissingPackageError("signatures need the package cryptography: pip install 'switchyard[signing]'")


def _message(digest: str) -> bytes:
    """What is signed. The first line keeps it apart from whatever else the key may sign."""
    if not DIGEST_PATTERN.fullmatch(digest):
        raise StoreError("not a sha256 digest")
    return f"switchyard expert v1\n{digest}\n".encode("ascii")
