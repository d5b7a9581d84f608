"""Whose signatures count: trusted keys, and whether experts must be signed by one of them."""

from __future__ import annotations

import base64
import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from store.errors import InvalidRequestError, MissingPackageError, SignatureError, UntrustedError
from store.record import ExpertRecord
from store.signature import fingerprint, missing, parse_signature

_KIND = "ssh-ed25519"


@dataclass(frozen=True)
class Signer:
    """Who signed an expert.

    Attributes:
        name: what the list of trusted keys calls the key; None where it is not on it.
        fingerprint: of the key, as `ssh-keygen -l` shows it.
    """

    name: str | None
    fingerprint: str


class Trust:
    """What a server asks of signatures.

    Args:
        keys: public key, 32 bytes → its name.
        required: refuse and do not serve what no trusted key has signed.

    Raises:
        InvalidRequestError: a signature is required, and there is no key.
        MissingPackageError: there are keys, and nothing can be checked here.
    """

    def __init__(self, keys: Mapping[bytes, str] | None = None, *, required: bool = False) -> None:
        self._keys = dict(keys or {})
        self.required = required
        if self._keys and find_spec("cryptography") is None:
            raise missing()
        if required and not self._keys:
            raise InvalidRequestError(
                "require_signature needs trusted_keys: whose signatures count", param="trusted_keys"
            )

    def check(self, digest: str, signature: str | None) -> None:
        """Whether an expert may be published.

        Raises:
            SignatureError: the signature is malformed, or not that of this file.
            UntrustedError: there is none and one is required; or its key is not trusted, where any are.
            MissingPackageError: it cannot be checked here.
        """
        if signature is None:
            if self.required:
                raise UntrustedError(
                    "this server takes signed experts only: sign the file (switchyard sign), and send the signature",
                    code="signature_required",
                )
            return
        parsed = parse_signature(signature)
        if not parsed.fits(digest):
            raise SignatureError("the signature is not of this file, or damaged: sign the file again")
        if self._keys and parsed.key not in self._keys:
            raise UntrustedError(f"the file is signed with {fingerprint(parsed.key)}, which this server does not trust")

    def accepts(self, record: ExpertRecord) -> bool:
        """Whether an expert that is in the store may be served: whoever can write there need not be trusted."""
        if not self.required:
            return True
        signer = self.signer(record)
        return signer is not None and signer.name is not None

    def signer(self, record: ExpertRecord) -> Signer | None:
        """Who signed an expert; None where nobody did, or the signature is not of its file."""
        try:
            key = None if record.signature is None else _verified(record.digest, record.signature)
        except MissingPackageError:
            return None
        return None if key is None else Signer(self._keys.get(key), fingerprint(key))


NO_TRUST = Trust()
"""Signatures are kept and shown, none is asked for."""


def trusted_keys(given: Iterable[str]) -> dict[bytes, str]:
    """Public keys, each an OpenSSH line (`ssh-ed25519 BASE64 NAME`) or a file of such lines, as key → name.

    Raises:
        InvalidRequestError: one is neither; the message says which.
    """
    found: dict[bytes, str] = {}
    for item in given:
        if item.startswith(f"{_KIND} "):
            lines = [item]
        else:
            try:
                lines = Path(item).read_text("utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise _fault(f"{item[:200]} is neither an {_KIND} line nor a file of them ({error})") from None
        for line in lines:
            if line.strip() and not line.lstrip().startswith("#"):
                key, name = _public_key(line)
                found[key] = name
    return found


def _public_key(line: str) -> tuple[bytes, str]:
    words = line.split(maxsplit=2)
    head = len(_KIND).to_bytes(4, "big") + _KIND.encode() + (32).to_bytes(4, "big")
    try:
        if words[0] != _KIND:
            raise ValueError
        blob = base64.b64decode(words[1], validate=True)
        if len(blob) != len(head) + 32 or not blob.startswith(head):
            raise ValueError
    except (ValueError, IndexError):
        raise _fault(f"{line[:100]!r} is no key: expected `{_KIND} BASE64 NAME`, as in a .pub file") from None
    key = blob[len(head) :]
    return key, words[2].strip() if len(words) > 2 else fingerprint(key)


@functools.lru_cache(maxsize=1 << 15)
def _verified(digest: str, signature: str) -> bytes | None:
    """The key that has signed the digest, or None."""
    try:
        parsed = parse_signature(signature)
    except SignatureError:
        return None
    return parsed.key if parsed.fits(digest) else None


def _fault(what: str) -> InvalidRequestError:
    return InvalidRequestError(f"trusted_keys: {what}", param="trusted_keys")
