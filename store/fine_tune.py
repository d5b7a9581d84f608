"""What is compressed: a full fine-tune's checkpoint, or a PEFT adapter."""

from __future__ import annotations

import json
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from store.adapter import Adapter, is_adapter, open_adapter
from store.adapter_config import AdapterKind
from store.checkpoint import Checkpoint, open_checkpoint
from store.errors import InvalidRequestError, StorageFullError, StoreError
from store.intake import FULL
from store.task_vector import check_same_parameters, deltas_between, load_float32


class FineTune:
    """A fine-tune of a base, tensor by tensor; as a context manager, for what it needs on disk meanwhile.

    Args:
        base: the base's checkpoint.
        folder: a checkpoint folder, or an adapter's.

    Raises:
        CheckpointError: it is unreadable, or none of this base.
    """

    def __init__(self, base: Checkpoint, folder: Path) -> None:
        self._base = base
        self._folder = folder
        self._scratch = ExitStack()
        self.adapter: Adapter | None = open_adapter(folder, base) if is_adapter(folder) else None
        self._tuned = None if self.adapter is not None else open_checkpoint(folder)
        if self._tuned is not None:
            check_same_parameters(base, self._tuned)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._scratch.close()

    def deltas(self) -> Iterator[tuple[str, torch.Tensor]]:
        """`(name, tuned − base)` in float32 for every parameter, sorted by name."""
        if self.adapter is not None:
            return self.adapter.deltas()
        assert self._tuned is not None
        return deltas_between(self._base, self._tuned)

    def check_low_rank(self) -> None:
        """Raise InvalidRequestError unless this is an adapter whose factors can be kept as they are."""
        adapter = self.adapter
        kinds = (AdapterKind.LORA, AdapterKind.ADALORA)
        if adapter is None or adapter.config.kind not in kinds or adapter.has_magnitudes:
            what = "a DoRA" if adapter is not None and adapter.has_magnitudes else "such an"
            raise InvalidRequestError(
                f"{what} adapter is no product of two factors once merged: give a rank, or take another codec",
                param="rank",
            )

    def own(self) -> Checkpoint:
        """The fine-tune's own weights.

        Raises:
            InvalidRequestError: it is an adapter, which has none.
        """
        if self.adapter is not None or self._tuned is None:
            raise InvalidRequestError(
                "overwrite keeps a checkpoint's weights bit by bit, and an adapter has none: merge it and give the "
                "merged checkpoint, or take another codec (low-rank keeps its factors)",
                param="codec",
            )
        return self._tuned

    def checkpoint(self) -> Checkpoint:
        """The whole model, for those who run it. An adapter is merged into a copy of the base, in float32.

        Raises:
            StoreError: there is no room for the copy.
        """
        if self._tuned is None:
            assert self.adapter is not None
            folder = Path(self._scratch.enter_context(tempfile.TemporaryDirectory(prefix="switchyard-merged-")))
            try:
                write_merged(self.adapter, folder)
            except OSError as error:
                kind = StorageFullError if error.errno in FULL else StoreError
                raise kind(f"cannot merge the adapter into a copy of the base: {error.strerror}") from None
            self._tuned = open_checkpoint(folder)
        return self._tuned


def write_merged(adapter: Adapter, folder: Path) -> None:
    """Write base + adapter as a float32 checkpoint; see `write_float32`."""
    write_float32(adapter.base, lambda name, weight: weight + adapter.delta(name, weight), folder)


def write_float32(base: Checkpoint, change: Callable[[str, torch.Tensor], torch.Tensor], folder: Path) -> None:
    """Write a changed base as a float32 checkpoint, one tensor in memory at a time; the other files are the base's.

    Args:
        change: a parameter's name and float32 values to its new ones.

    Raises:
        OSError: it cannot be written.
    """
    for file in base.folder.iterdir():
        if file.suffix in (".json", ".model", ".jinja", ".txt") and not file.name.endswith(".index.json"):
            shutil.copyfile(file, folder / file.name)
    table, offset = {}, 0
    for name, tensor in base.tensors.items():
        stop = offset + 4 * tensor.span.numel
        table[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [offset, stop]}
        offset = stop
    head = json.dumps(table).encode()
    with (folder / "model.safetensors").open("wb") as out:
        out.write(struct.pack("<Q", len(head)) + head)
        for name, tensor in base.tensors.items():
            out.write(change(name, load_float32(tensor)).contiguous().numpy().tobytes())
