"""Routing features that are computed once and kept on disk, so that an experiment with the router takes seconds."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from rich.progress import track

from bench.hidden_states import HiddenStates, Place
from bench.unrelated import CACHE
from router.features import Features, Featurizer
from store.fingerprint import manifest_of

CHUNK = 256


class KeptFeatures:
    """Features of texts at several places of one base. The base is loaded only if a text is new.

    Files: `routing-FINGERPRINT-LAYER-WINDOW.npy`, `[n, e]` float32, with the digests of the n texts beside it.
    """

    def __init__(self, base: Path, places: Sequence[Place], folder: Path = CACHE / "features") -> None:
        self._base = base
        self._places = places
        self._folder = folder
        self._fingerprint = manifest_of(base, None).fingerprint[:12]
        self._known: dict[Place, dict[str, Features]] = {place: self._load(place) for place in places}

    def compute(self, texts: Iterable[str]) -> None:
        """Have the features of all texts at all places."""
        wanted = dict.fromkeys(texts)
        missing = [text for text in wanted if any(_key(text) not in known for known in self._known.values())]
        if not missing:
            return
        states = HiddenStates(self._base, *(sorted(set(side)) for side in zip(*self._places, strict=True)))
        for start in track(range(0, len(missing), CHUNK), "features"):
            chunk = missing[start : start + CHUNK]
            found = states.features(chunk)
            for place, known in self._known.items():
                known.update(zip(map(_key, chunk), found[place], strict=True))
            for place in self._places:  # an interrupted run goes on where it was
                self._save(place)

    def at(self, place: Place) -> Featurizer:
        """A featurizer of that place for texts that have been computed."""
        known = self._known[place]

        async def featurize(texts: Sequence[str]) -> Features:
            return np.stack([known[_key(text)] for text in texts])

        return featurize

    def _path(self, place: Place) -> Path:
        return self._folder / f"routing-{self._fingerprint}-{place[0]}-{place[1]}.npy"

    def _load(self, place: Place) -> dict[str, Features]:
        path = self._path(place)
        if not path.is_file():
            return {}
        keys = json.loads(path.with_suffix(".json").read_text())
        return dict(zip(keys, np.load(path), strict=True))

    def _save(self, place: Place) -> None:
        path, known = self._path(place), self._known[place]
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_suffix(".tmp.npy")
        np.save(scratch, np.stack(list(known.values())))
        path.with_suffix(".json").write_text(json.dumps(list(known)))
        os.replace(scratch, path)


def _key(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:24]
