"""Exemplars out of an expert's own traffic: what is asked of it by name says what it is for. Off unless asked for."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Iterable, Sequence

from server.audit import AuditEntry, AuditLog
from server.choices import Part
from server.engine.types import Tokenizer
from server.library import Library
from server.prompts import Prompt
from store.access import OPERATOR, Caller
from store.errors import InvalidRequestError, NotFoundError, SwitchyardError

log = logging.getLogger(__name__)

ENOUGH = 20
"""New prompts at which an expert's exemplars are changed: each change has the router learn the expert anew."""
_TOKEN_CHARACTERS = 16
"""Characters kept for each token that routing looks at: more than tokens have, and little enough to keep."""
_MEMORY = 16 << 20
"""Characters that wait, of all experts together; those of the expert that was named longest ago go first."""

Key = tuple[str, str]
"""Name and digest of an expert: what was asked of the file that a name pointed to before says nothing of this one."""


class Harvest:
    """Collects prompts of requests that name an expert, and makes exemplars of them.

    Explicit mixes and routed prompts are left out, as are prompts that come as token ids. Prompts are cut to what
    routing looks at, kept in memory until there are enough, and then stored as the expert's exemplars.

    Args:
        most: exemplars of an expert at which it is left alone, wherever they came from.
        tokens: of a prompt that routing looks at.
    """

    def __init__(self, library: Library, tokenizer: Tokenizer, audit: AuditLog, *, most: int, tokens: int) -> None:
        self._library = library
        self._tokenizer = tokenizer
        self._audit = audit
        self._most = most
        self._tokens = tokens
        self._waiting: OrderedDict[Key, dict[str, None]] = OrderedDict()
        self._size = 0

    def note(self, prompts: Sequence[Prompt], expert: Part, by: Caller) -> None:
        """Keep the prompts of a request that named an expert, whoever asked, unless there are enough."""
        del by
        waiting = self._waiting.setdefault((expert.name, expert.digest), {})
        self._waiting.move_to_end((expert.name, expert.digest))
        for prompt in prompts:
            text = self._start_of(prompt)
            if text and text not in waiting and len(waiting) < self._most:
                waiting[text] = None
                self._size += len(text)
        while self._size > _MEMORY:
            self._drop(next(iter(self._waiting)))

    async def work(self) -> None:
        """Give exemplars to those experts of which enough is known.

        Raises:
            SwitchyardError: the store failed; what was collected waits for the next turn.
        """
        for key in list(self._waiting):
            try:
                record, present = await self._library.exemplars(key[0], OPERATOR)
            except NotFoundError:
                self._drop(key)
                continue
            room = self._most - record.exemplar_count
            if room <= 0 or (record.name, record.digest) != key:
                self._drop(key)
            elif len(self._waiting.get(key, ())) >= min(ENOUGH, room):
                await self._give(key, present, room)

    async def _give(self, key: Key, present: Sequence[str], room: int) -> None:
        found = tuple(self._waiting[key])
        known = await asyncio.to_thread(self._cut, present)
        fresh = [text for text in await asyncio.to_thread(self._cut, found) if text not in known]
        if len(fresh) < min(ENOUGH, room):
            self._replace(key, found, fresh)  # what is there already comes again and again
            return
        try:
            record = await self._library.set_exemplars(
                key[0], lambda read: [*(own := read()), *fresh[: max(0, self._most - len(own))]], OPERATOR
            )
        except (InvalidRequestError, NotFoundError) as error:  # removed meanwhile, or its own fill all the room
            log.warning("the expert %s gets no exemplars from its traffic: %s", key[0], error.message)
            self._drop(key)
            return
        self._replace(key, found, ())
        log.info("the expert %s is found by %d exemplars now, with those of its traffic", key[0], record.exemplar_count)
        details = {"digest": record.digest, "count": str(record.exemplar_count)}
        entry = AuditEntry("expert.exemplars_harvest", key[0], "server", None, "done", details=details)
        try:
            await asyncio.to_thread(self._audit.write, entry)
        except OSError as error:
            log.error("the audit log cannot be written (%s): %s", error.strerror, entry)

    def _start_of(self, prompt: Prompt) -> str:
        """The beginning of what is asked; empty if nothing is."""
        if not prompt.characters:  # token ids would have to become text first, while others wait
            return ""
        try:
            return prompt.questions(self._tokenizer)[-1].strip()[: _TOKEN_CHARACTERS * self._tokens]
        except SwitchyardError:
            return ""

    def _cut(self, texts: Iterable[str]) -> dict[str, None]:
        """The part of each text that routing looks at; different texts may begin alike."""
        starts = (self._tokenizer.encode(text)[: self._tokens] for text in texts)
        # A character of several tokens may be torn at the end.
        cut = (self._tokenizer.decode(start).rstrip("\ufffd").strip() for start in starts)
        return {text: None for text in cut if text}

    def _replace(self, key: Key, gone: Iterable[str], kept: Iterable[str]) -> None:
        """Let others wait instead of some; what came meanwhile stays."""
        later = dict.fromkeys([*kept, *(self._waiting.get(key, {}).keys() - set(gone))])
        self._drop(key)
        if later:
            self._waiting[key] = later
            self._size += sum(map(len, later))

    def _drop(self, key: Key) -> None:
        self._size -= sum(map(len, self._waiting.pop(key, ())))
