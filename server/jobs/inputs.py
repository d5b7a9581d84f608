"""Which files make up a fine-tune: plain names, safetensors, and what orders them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from store.errors import InvalidRequestError

_WEIGHTS = ".safetensors"
_BESIDE = frozenset({"model.safetensors.index.json", "adapter_config.json"})
_IGNORED = frozenset({"config.json"})
"""May come along, and is not looked at: the base's own counts."""

Put = Callable[[Path], int]


def inputs_of(files: Mapping[str, Put]) -> dict[str, Put]:
    """The files that a job works on.

    Raises:
        InvalidRequestError: they are no fine-tune, or one of them has no place in one.
    """
    for name in files:
        if not name.endswith(_WEIGHTS) and name not in _BESIDE | _IGNORED:
            raise InvalidRequestError(
                f"{name} has no place here: send the {_WEIGHTS} files, and {' or '.join(sorted(_BESIDE))} where there "
                "is one; configuration and tokenizer are the base's",
                param="uploads",
            )
    if not any(name.endswith(_WEIGHTS) for name in files):
        raise InvalidRequestError(f"there is no {_WEIGHTS} file among the uploads", param="uploads")
    return {name: put for name, put in files.items() if name not in _IGNORED}
