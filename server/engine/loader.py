"""Expert file → decoded tensors on the device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from server.engine.merged import DecodedExpert, to_device
from store.expert_file import SparseEntry, read_deltas, read_header
from store.manifest import BaseManifest

_INT32_NUMEL = 1 << 31


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
            if isinstance(entry, SparseEntry):
                total += entry.nnz * ((4 if entry.numel < _INT32_NUMEL else 8) + 1)
            else:
                total += entry.numel * 4
        return total

    def load(self, digest: str) -> DecodedExpert:
        deltas = read_deltas(self._fetch(digest), self._manifest)
        return DecodedExpert(digest, {name: to_device(delta, self._device) for name, delta in deltas})
