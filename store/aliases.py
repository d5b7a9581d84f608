"""How aliases come and go. They follow their expert through replacements; none points to another alias."""

from __future__ import annotations

import time

from store.access import OPERATOR, Caller
from store.alias import Alias, alias_to_json, parse_entry
from store.backends import ABSENT, BlobStore
from store.catalogue import Catalogue
from store.errors import ConflictError, InvalidRequestError, NotFoundError, StoreError
from store.names import Names
from store.ownership import check_alias_quota, check_name_free, check_owned
from store.record import ExpertRecord


class Aliases:
    """Changes the aliases of a store. Thread-safe, over all processes.

    Args:
        catalogue: the experts they may point to.
        names: what they may be called.
    """

    def __init__(self, store: BlobStore, catalogue: Catalogue, names: Names) -> None:
        self._store = store
        self._catalogue = catalogue
        self._names = names

    def put(self, name: str, target: str, by: Caller = OPERATOR) -> tuple[Alias, bool]:
        """Let an alias point to an expert, whatever it pointed to before. Returns it, and whether it is a new one.

        Raises:
            InvalidRequestError: the name is malformed or reserved, or the target is an alias itself.
            NotFoundError: there is no such expert.
            ExpertUnavailableError: the expert is not served here.
            ConflictError: an expert has that name, or it is somebody else's.
            NotPermittedError: the expert is not the caller's.
            QuotaExceededError: it has as many aliases as a tenant may give it.
        """
        self._names.check(name)
        with self._store.exclusive():
            present = self._store.get_record(name)
            existing = parse_entry(name, present)
            self._check_name(name, existing, by, is_taken=present is not None)
            record = self._check_target(name, target, by)
            if isinstance(existing, Alias) and existing.target == target:
                return existing, False
            check_alias_quota(record, self._catalogue.aliases_of(target), by)
            alias = Alias(name, target, int(time.time()))
            if not self._store.put_record(name, alias_to_json(alias), expected=ABSENT if present is None else present):
                raise StoreError("the store let another writer in")
        return alias, existing is None

    def remove(self, name: str, by: Caller = OPERATOR) -> Alias:
        """Take an alias away; its expert stays. Returns what it was.

        Raises:
            NotFoundError: there is none of that name.
            NotPermittedError: its expert is not the caller's.
        """
        with self._store.exclusive():
            alias = self._catalogue.alias(name, by)
            if not by.is_admin:
                check_owned(self._catalogue.get(alias.target, by), by)
            self._store.delete_record(name)
        return alias

    def _check_name(self, name: str, existing: ExpertRecord | Alias | None, by: Caller, *, is_taken: bool) -> None:
        """The store is held. Whose a name is that the caller may not know, is not told."""
        if isinstance(existing, Alias):
            try:
                self._catalogue.alias(name, by)
            except NotFoundError:
                raise ConflictError(f"the name {name} is taken; choose another", param="alias") from None
            if not by.is_admin:
                check_owned(self._catalogue.get(existing.target, by), by)
            return
        check_name_free(name, existing, by, is_taken=is_taken, replace=False)
        if is_taken:
            raise ConflictError(f"the name {name} belongs to an expert; an alias cannot take its place", param="alias")

    def _check_target(self, name: str, target: str, by: Caller) -> ExpertRecord:
        """The expert that an alias may point to. The store is held: the catalogue is the latest."""
        if target == name:
            raise InvalidRequestError(f"the alias {name} cannot point to itself", param="target")
        try:
            record: ExpertRecord = self._catalogue.get(target, by)
        except NotFoundError as error:
            raise NotFoundError(error.message, param="target") from None
        if record.name != target:
            raise InvalidRequestError(
                f"{target} is itself an alias, of {record.name}: point to {record.name}", param="target"
            )
        check_owned(record, by)
        return record
