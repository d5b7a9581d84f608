"""Expert file → deltas in packed form on the device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from server.engine.expert import DecodedExpert
from server.engine.kernels import pack, packed_bytes
from store.expert_file import DenseEntry, read_deltas, read_header
from store.manifest import BaseManifest


class ExpertLoader:
    """`ExpertSource` over expert files. The files were validated when they came in and are checked again here: bytes
    can rot between upload and load."""

    def __init__(self, manifest: BaseManifest, device: torch.device, fetch: Callable[[str], Path]) -> None:
        self._manifest = manifest
        self._device = device
        self._fetch = fetch

    def decoded_bytes(self, digest: str) -> int:
        total = 0
        for entry in read_header(self._fetch(digest)).tensors.values():
            if isinstance(entry, DenseEntry):
                total += packed_bytes(entry.shape, None)
            else:
                total += packed_bytes(entry.shape, entry.nnz, entry.params.get("top", 1))
        return total

    def load(self, digest: str) -> DecodedExpert:
        deltas = read_deltas(self._fetch(digest), self._manifest)
        return DecodedExpert(digest, {name: pack(delta, self._device) for name, delta in deltas})
