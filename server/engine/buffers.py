"""Memory for weights that lie beside the pristine ones: taken, put back and used again, within a budget."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from server.engine.large_pages import side_by_side


@dataclass
class _Piece:
    """Memory that buffers share, which comes back with the last of them."""

    nbytes: int
    buffers: int


class Buffers:
    """Buffers of the shapes and types of a model's parameters.

    On a CPU those that are needed together lie side by side in large pages: what has pages of its own, all small, is
    read 7 % slower.

    Attributes:
        budget: bytes.
        used_bytes: of buffers that are taken, and of those put back.
    """

    def __init__(self, like: Mapping[str, torch.Tensor], budget: int) -> None:
        """Args:
        budget: at least the bytes of all tensors of `like`.
        """
        self._like = like
        self.budget = budget
        self._spare: defaultdict[str, list[torch.Tensor]] = defaultdict(list)
        self._pieces: dict[int, _Piece] = {}
        """By the ids of their buffers."""
        self.used_bytes = 0

    def make_room(self, names: Iterable[str]) -> bool:
        """Whether a buffer for each of these parameters can be had, once what has been put back and is not for them is
        given up, if need be."""
        wanted = set(names)
        while not (fits := self._missing_bytes(wanted) <= self.budget - self.used_bytes):
            needless = [name for name, spare in self._spare.items() if len(spare) > (name in wanted)]
            if not needless:
                break
            self._give_up(needless)
        return fits

    def take(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """A buffer for each of these parameters, in their order. What they hold is arbitrary.

        Raises whatever an allocation raises; nothing has been taken then.
        """
        wanted = list(names)
        if not self.make_room(wanted):  # what would do shares its memory with what is needless
            self._give_up(wanted)
        for name, buffer in self._made([name for name in wanted if not self._spare[name]]):
            self._spare[name].append(buffer)
        return {name: self._spare[name].pop() for name in wanted}

    def put_back(self, buffers: Mapping[str, torch.Tensor]) -> None:
        """They may be taken again."""
        for name, buffer in buffers.items():
            self._spare[name].append(buffer)

    def _missing_bytes(self, names: Iterable[str]) -> int:
        return sum(self._like[name].nbytes for name in names if not self._spare[name])

    def _give_up(self, names: Iterable[str]) -> None:
        """One spare buffer of each."""
        for name in names:
            if self._spare[name]:
                piece = self._pieces.pop(id(self._spare[name].pop()))
                piece.buffers -= 1
                self.used_bytes -= 0 if piece.buffers else piece.nbytes

    def _made(self, names: Sequence[str]) -> Iterator[tuple[str, torch.Tensor]]:
        like = [self._like[name] for name in names]
        owners = iter(names)
        for buffers in side_by_side(like) if _in_host_memory(like) else ([torch.empty_like(one)] for one in like):
            piece = _Piece(sum(buffer.nbytes for buffer in buffers), len(buffers))
            self.used_bytes += piece.nbytes
            for buffer in buffers:
                self._pieces[id(buffer)] = piece
                yield next(owners), buffer


def _in_host_memory(tensors: list[torch.Tensor]) -> bool:
    return all(tensor.device.type == "cpu" for tensor in tensors)
