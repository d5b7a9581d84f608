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
        last = None if former is None else former.features_key
        now = None if entry is None else entry.features_key
        kept = [] if entry is None else [key for key in known if key != last]
        if former is not None and entry is not None and last is not None and former.digest != entry.digest:
            kept.append(last)  # other exemplars of the same version are not rolled back
        if kept := [key for key in kept if key != now][-_KEPT:]:
            self._keys[name] = kept
        return frozenset([*known, *([] if last is None else [last])]) - frozenset(kept)
