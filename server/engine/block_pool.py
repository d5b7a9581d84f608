"""Which blocks of the cache are used, by how many sequences, and what the unused ones still hold."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

Key = bytes
"""Says what a block holds: a digest of all that its keys and values depend on."""


class BlockPool:
    """Blocks are blank, used by one sequence or several, or kept: unused, but found again by key until somebody needs
    the room, least recently used first.

    Args:
        blocks: all of them, blank.
    """

    def __init__(self, blocks: Iterable[int]) -> None:
        self._blank = list(blocks)
        self._users: dict[int, int] = {}
        self._kept: OrderedDict[int, None] = OrderedDict()
        self._block_of: dict[Key, int] = {}
        self._key_of: dict[int, Key] = {}

    @property
    def free(self) -> int:
        """Blocks that nobody uses."""
        return len(self._blank) + len(self._kept)

    @property
    def kept(self) -> int:
        """Those of them that hold something."""
        return len(self._kept)

    def take(self, count: int) -> list[int] | None:
        """Blocks for one user, whatever they held forgotten; None, and nothing changed, if there are too few."""
        if count > self.free:
            return None
        taken = []
        for _ in range(count):
            if self._blank:
                block = self._blank.pop()
            else:
                block, _ = self._kept.popitem(last=False)
                self._forget(block)
            self._users[block] = 1
            taken.append(block)
        return taken

    def share(self, keys: Sequence[Key]) -> list[int]:
        """The blocks of the first keys, up to one that is unknown, with one user more each."""
        shared = []
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            self._kept.pop(block, None)
            self._users[block] = self._users.get(block, 0) + 1
            shared.append(block)
        return shared

    def publish(self, block: int, key: Key) -> None:
        """Let a used block be found. Where another one holds the same already, that one is found."""
        if key not in self._block_of and block not in self._key_of:
            self._block_of[key] = block
            self._key_of[block] = key

    def withdraw(self, blocks: Iterable[int]) -> None:
        """Let used blocks be found no more: what they hold is not what it should be."""
        for block in blocks:
            self._forget(block)

    def give_back(self, blocks: Sequence[int]) -> None:
        """End one use of each; the last ones, which are worth nothing without those before them, will be needed
        first."""
        for block in reversed(blocks):
            self._users[block] -= 1
            if self._users[block]:
                continue
            del self._users[block]
            if block in self._key_of:
                self._kept[block] = None
            else:
                self._blank.append(block)

    def _forget(self, block: int) -> None:
        key = self._key_of.pop(block, None)
        if key is not None:
            del self._block_of[key]
