"""Keys to sign experts with."""

from __future__ import annotations

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from store.signature import sign


class Key:
    """A private key; the same number, the same key."""

    def __init__(self, number: int, name: str) -> None:
        self.private = Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32)
        public = self.private.public_key()
        self.raw = public.public_bytes(Encoding.Raw, PublicFormat.Raw)
        self.line = f"{public.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()} {name}"

    def sign(self, digest: str) -> str:
        """A signature as it stands in a file."""
        return str(sign(digest, self.private))


ADA, MALLORY = Key(1, "ada@example.org"), Key(2, "mallory")
