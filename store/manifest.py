"""What an expert is bound to: the base model's weights by digest, and its tensors by name and shape."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BaseManifest:
    """Identity of a base model.

    Attributes:
        fingerprint: hex sha256 over the weights (see `store.fingerprint`).
        tensors: name → shape of every parameter an expert may carry; tied weights appear once.
    """

    fingerprint: str
    tensors: dict[str, tuple[int, ...]]
