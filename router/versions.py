"""Whose features stay on disk although a name points to something else: a version that may be rolled back to."""

from __future__ import annotations

from router.index import Entry

_KEPT = 8
"""Earlier versions of a name: as many as the registry keeps."""


class Versions:
    """Remembers what names pointed to."""

    def __init__(self) -> None:
        self._keys: dict[str, list[str]] = {}
        """Of each name, under which the features of its earlier versions are cached, the oldest first."""

    def replaced(self, name: str, former: Entry | None, entry: Entry | None) -> frozenset[str]:
        """Take in that a name points to another entry, or to none.

        Returns:
            Keys of features that this name does not need any more.
        """
        known = self._keys.pop(name, [])
        if former is not None and former.features_key is not None:
            known = [key for key in known if key != former.features_key] + [former.features_key]
        if entry is None:
            return frozenset(known)
        known = [key for key in known if key != entry.features_key]
        # Other exemplars of the same version are not rolled back.
        same = former is not None and former.digest == entry.digest
        gone = known[-1:] if same and former is not None and former.features_key in known else []
        kept = known[: len(known) - len(gone)][-_KEPT:]
        if kept:
            self._keys[name] = kept
        return frozenset(known) - frozenset(kept)
