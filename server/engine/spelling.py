"""What a single token stands for, in bytes: a tokenizer's vocabulary is written in an alphabet of its own."""

from __future__ import annotations

import re

from transformers import PreTrainedTokenizerBase

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
"""How SentencePiece writes a token that is one byte."""


class Spelling:
    """Bytes of tokens.

    Byte-level vocabularies (GPT-2's kind) write each byte as one printable character; SentencePiece's write a space
    as ▁ and single bytes by number.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._added: dict[int, str] = {id_: token.content for id_, token in tokenizer.added_tokens_decoder.items()}
        backend = getattr(tokenizer, "backend_tokenizer", None)
        decoder = b"" if backend is None or backend.decoder is None else bytes(backend.decoder.__getstate__())
        self._byte_level = b'"ByteLevel"' in decoder

    def bytes_of(self, token: int) -> bytes:
        """The token's bytes; none for an id that the tokenizer does not know."""
        if token in self._added:
            return self._added[token].encode()
        written = self._tokenizer.convert_ids_to_tokens(token)
        if not isinstance(written, str):
            return b""
        if self._byte_level and all(character in _BYTES for character in written):
            return bytes(_BYTES[character] for character in written)
        if byte := _BYTE.fullmatch(written):
            return bytes([int(byte[1], 16)])
        return written.replace("▁", " ").encode()


def _alphabet() -> dict[str, int]:
    """GPT-2's characters for bytes: printable Latin-1 for itself, the others from 256 on, in order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTES = _alphabet()
