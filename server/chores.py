"""What a server does by itself every now and then."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from store.errors import SwitchyardError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Chore:
    """One of these things.

    Attributes:
        name: what it is about, for the log.
        seconds: the pause between its end and its next turn.
        work: does it once; what it raises is logged, and it has its next turn all the same.
    """

    name: str
    seconds: float
    work: Callable[[], Awaitable[object]]


async def do_all(chores: Sequence[Chore]) -> None:
    """Do them side by side, the first time at once, until cancelled."""
    await asyncio.gather(*(_do(chore) for chore in chores))


async def _do(chore: Chore) -> None:
    said = ""
    while True:
        try:
            await chore.work()
            said = ""
        except SwitchyardError as error:
            if error.message != said:  # once, not at every turn
                log.warning("%s must wait: %s", chore.name, error.message)
            said = error.message
        except Exception as error:  # a bug of ours: the other chores go on
            if repr(error) != said:
                log.exception("%s failed", chore.name)
            said = repr(error)
        await asyncio.sleep(chore.seconds)
