"""Experts on top of experts: which others an expert needs to answer, and who needs whom.

A delta against another expert (a skill on top of a knowledge expert; PaST, arXiv 2601.11258) names that file by its
digest. Its task vector is its own plus that of everything it stands on, and whoever may not see one of those does not
see it either. Digests cannot form a circle; how deep they go is bounded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from store.access import Caller
from store.errors import ConflictError, ExpertRemovedError, ExpertUnavailableError, InvalidRequestError
from store.patterns import Half
from store.record import KEPT_VERSIONS, ExpertRecord

MAX_DEPTH = 8
"""Experts that one may stand on, counted down to the base."""
_NAMED = 5


class Lineage:
    """Who stands on whom, among the experts of a store and their earlier versions. Never changes.

    What is not served here counts as well: another server may serve it, of another base or with more trust, and what it
    stands on must stay.

    Args:
        records: all experts of the store.
        accepts: whether a version of one may be used.
        base: fingerprint of the base that is served: only its versions can be stood on.
    """

    def __init__(self, records: Iterable[ExpertRecord], accepts: Callable[[ExpertRecord], bool], base: str) -> None:
        self._held: dict[str, list[ExpertRecord]] = {}
        self._versions: dict[str, ExpertRecord] = {}
        self._needed_by: dict[str, list[ExpertRecord]] = {}
        for record in records:
            for version in record.versions:
                if version.relative_to is not None:
                    self._needed_by.setdefault(version.relative_to, []).append(record)
                if accepts(version):
                    self._held.setdefault(version.digest, []).append(record)
                    if version.base_fingerprint == base:
                        self._versions[version.digest] = version

    def chain(self, relative_to: str | None) -> tuple[str, ...]:
        """Digests of what an expert relative to this one stands on, nearest first.

        Raises:
            ExpertUnavailableError: one of them is not here, or there are more than `MAX_DEPTH`.
        """
        found: list[str] = []
        while relative_to is not None:
            if relative_to not in self._versions:
                raise ExpertUnavailableError(
                    f"the expert stands on another one, {relative_to[:12]}…, which is not here: publish that first",
                    param="relative_to",
                    code="parent_not_found",
                )
            if len(found) == MAX_DEPTH:
                raise ExpertUnavailableError(
                    f"the expert stands on more than {MAX_DEPTH} others: merge some of them", param="relative_to"
                )
            found.append(relative_to)
            relative_to = self._versions[relative_to].relative_to
        return tuple(found)

    def stack(self, digest: str) -> tuple[str, ...]:
        """The digest and those that its expert stands on, nearest first, for another one to stand on.

        Raises:
            InvalidRequestError: one of them is not here, or there are too many; `param` is "relative_to".
        """
        try:
            return self.chain(digest)
        except ExpertUnavailableError as error:
            raise InvalidRequestError(error.message, param=error.param, code=error.code) from None

    def below(self, digest: str) -> tuple[str, ...]:
        """Digests of what the expert of that digest stands on, nearest first.

        Raises:
            ExpertUnavailableError: as `chain`.
            ExpertRemovedError: there is no such expert.
        """
        if digest not in self._versions:
            raise ExpertRemovedError(f"expert {digest[:12]} was removed just now; try again")
        return self.chain(self._versions[digest].relative_to)

    def is_exact(self, digest: str) -> bool:
        """Whether the expert of that digest, alone and at weight 1, is its fine-tune bit by bit, in some type."""
        return digest in self._versions and self._versions[digest].exact

    def half(self, digest: str) -> Half | None:
        """The 16-bit type of the weights that the expert of that digest overwrites, where that is known."""
        return self._versions[digest].half if digest in self._versions else None

    def is_whole(self, record: ExpertRecord) -> bool:
        """Whether everything that an expert stands on is here."""
        try:
            self.chain(record.relative_to)
        except ExpertUnavailableError:
            return False
        return True

    def sees(self, by: Caller, record: ExpertRecord) -> bool:
        """Whether everything that an expert stands on exists for the caller; what is not here hides nothing."""
        if record.relative_to is None or not self.is_whole(record):
            return True
        chain = self.chain(record.relative_to)
        return all(any(by.sees(holder.access) for holder in self._held[digest]) for digest in chain)

    def check_new(self, record: ExpertRecord, by: Caller) -> None:
        """Whether an expert may be published: what it stands on must be here, and exist for whoever publishes it.

        Raises:
            InvalidRequestError: it is not; `param` is "relative_to".
        """
        if record.relative_to is not None:
            self.stack(record.relative_to)
        if not self.sees(by, record):
            raise InvalidRequestError(
                f"the expert stands on another one, {str(record.relative_to)[:12]}…, which is not here: publish that "
                "first",
                param="relative_to",
                code="parent_not_found",
            )

    def check_unneeded(self, record: ExpertRecord, by: Caller) -> None:
        """Whether an expert may go: nothing may stand on it or on an earlier version of it.

        Raises:
            ConflictError: something does; the message names what of it exists for the caller.
        """
        children = {child.name: child for version in record.versions for child in self._children(version, record)}
        if not children:
            return
        known = sorted(name for name, child in children.items() if by.sees(child.access))
        named = ", ".join(known[:_NAMED]) + (" and others" if len(known) > _NAMED or len(known) < len(children) else "")
        raise ConflictError(
            f"{named or 'other experts'} stand on the expert {record.name}: remove them first",
            param="name",
            code="has_children",
        )

    def kept(self, versions: Sequence[ExpertRecord], record: ExpertRecord) -> tuple[ExpertRecord, ...]:
        """The earlier versions that a name keeps, the latest first: what something stands on, and then the latest.

        Args:
            versions: of that name, the latest first.
            record: what the name points to next.

        Raises:
            ConflictError: something stands on more versions than are kept.
        """
        below = set(self.chain(record.relative_to))
        needed = [v for v in versions if v.digest in below or self._needed_by.get(v.digest)]
        if len(needed) > KEPT_VERSIONS:
            raise ConflictError(
                f"other experts stand on {len(needed)} versions of {record.name}, and {KEPT_VERSIONS} are kept: "
                "remove some of those experts, or publish this under another name",
                param="name",
                code="has_children",
            )
        spare = [version for version in versions if version not in needed][: KEPT_VERSIONS - len(needed)]
        return tuple(version for version in versions if version in needed or version in spare)

    def _children(self, version: ExpertRecord, record: ExpertRecord) -> list[ExpertRecord]:
        """Who stands on a version, where no other name holds it."""
        if any(holder.name != record.name for holder in self._held.get(version.digest, ())):
            return []
        return [child for child in self._needed_by.get(version.digest, ()) if child.name != record.name]
