"""Routing features: where they come from, and a cache of those of the exemplars."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import tempfile
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt

from store.errors import SwitchyardError

log = logging.getLogger(__name__)

Features = npt.NDArray[np.float32]
"""float32; `[n, e]` for n texts unless said otherwise, e the width of the base's hidden states."""

Featurizer = Callable[[Sequence[str]], Awaitable[Features]]
"""`[n]` texts, none of them blank → `[n, e]` features of the pristine base, whatever is patched in."""

UNUSED_DAYS = 30
_DAY = 86_400
_SEAL_BYTES = hashlib.sha256().digest_size


class OvertakenError(Exception):
    """Nobody wants the features any more."""


async def featurize_all(
    featurize: Featurizer, texts: Sequence[str], batch: int, wanted: Callable[[], bool] = lambda: True
) -> Features:
    """Features of many texts, `batch` at a time, so that prompts in a hurry find a place between two batches.

    Args:
        wanted: asked before each batch whether to go on.

    Returns:
        `[len(texts), e]` float32.

    Raises:
        SwitchyardError: the featurizer failed, or gave something that is not finite features.
        OvertakenError: they are not wanted.
    """
    found = []
    for start in range(0, len(texts), batch):
        if not wanted():
            raise OvertakenError
        chunk = texts[start : start + batch]
        found.append(checked(await featurize(chunk), len(chunk)))
    return np.concatenate(found)


def checked(features: Features, rows: int) -> Features:
    """The features themselves, if they are `rows` finite vectors: one NaN among the centres would spoil every search.

    Raises:
        SwitchyardError: they are not.
    """
    if features.ndim != 2 or len(features) != rows or features.shape[1] == 0:
        raise SwitchyardError(f"{rows} texts have routing features of shape {list(features.shape)}")
    if not np.isfinite(features).all():
        raise SwitchyardError("the base gave routing features that are not finite")
    return np.ascontiguousarray(features, dtype=np.float32)


def features_key(exemplars: str, forms: int) -> str:
    """Under which the features of so many forms of an expert's exemplars are cached; `max_exemplars` may change."""
    return f"{exemplars}/{forms}"


class RecentFeatures:
    """Features of the prompts seen last: each turn of a conversation sends all of those before it again.

    Args:
        most: how many are kept.
    """

    def __init__(self, featurize: Featurizer, most: int = 2048) -> None:
        self._featurize = featurize
        self._most = most
        self._known: OrderedDict[bytes, Features] = OrderedDict()

    async def features(self, texts: Sequence[str]) -> Features:
        """`[n, e]`; what is missing is computed in one batch. Blank texts have no features: leave them out.

        Raises:
            SwitchyardError: the featurizer failed, or gave something that is not finite features.
        """
        keys = [hashlib.sha256(text.encode()).digest() for text in texts]
        found = {key: self._known[key] for key in keys if key in self._known}
        missing = {key: text for key, text in zip(keys, texts, strict=True) if key not in found}
        if missing:
            rows = checked(await self._featurize(list(missing.values())), len(missing))
            found.update(zip(missing, rows, strict=True))
        for key in keys:
            self._known[key] = found[key]
            self._known.move_to_end(key)
        while len(self._known) > self._most:
            self._known.popitem(last=False)
        return np.stack([found[key] for key in keys])


class FeatureCache:
    """Exemplar features on disk, so that a restart does not pass every exemplar through the base again.

    One file per set of exemplars: a `.npy` array followed by the sha256 of what precedes. It is written to a temporary
    file and renamed. Whatever is wrong with a file, its features are computed again; the cache never raises. A file
    that nobody has asked for in UNUSED_DAYS is removed when another one is saved.

    Args:
        folder: made when something is saved.
        fingerprint: of the base's weights.
        layer: how many of the base's layers the features pass through.
        variant: whatever else decides the features, such as the number of tokens looked at and the dtype.
    """

    def __init__(self, folder: Path, fingerprint: str, layer: int, *, variant: str = "") -> None:
        self._folder = folder
        self._space = f"{fingerprint}\0{layer}\0{variant}"
        self._looked = 0.0

    def load(self, key: str, rows: int) -> Features | None:
        """The features saved under `key` (any string that identifies the exemplars), `[rows, e]`, or None."""
        path = self._path(key)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            log.warning("cannot read cached routing features: %s", error.strerror)
            return None
        with suppress(OSError):  # of a cache that is only to be read, nothing is removed either
            os.utime(path)
        body, seal = data[:-_SEAL_BYTES], data[-_SEAL_BYTES:]
        if hashlib.sha256(body).digest() != seal:
            log.warning("cached routing features %s are damaged and will be computed again", path.name)
            return None
        try:
            return checked(np.load(io.BytesIO(body), allow_pickle=False), rows)
        except (ValueError, EOFError, SwitchyardError):
            log.warning("cached routing features %s are of another kind and will be computed again", path.name)
            return None

    def save(self, key: str, features: Features) -> None:
        """Save features under `key`. A full or read-only disk is logged: the cache only saves time."""
        buffer = io.BytesIO()
        np.save(buffer, features, allow_pickle=False)
        body = buffer.getvalue()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self._folder, suffix=".tmp", delete=False) as file:
                scratch = Path(file.name)
                try:
                    file.write(body + hashlib.sha256(body).digest())
                    file.close()
                    os.replace(scratch, self._path(key))
                except BaseException:
                    scratch.unlink(missing_ok=True)
                    raise
            self._remove_unused()
        except OSError as error:
            log.warning("cannot cache routing features: %s", error.strerror)

    def drop(self, key: str) -> None:
        """Remove what was saved under `key`, if anything is left of it."""
        try:
            self._path(key).unlink(missing_ok=True)
        except OSError as error:
            log.warning("cannot remove cached routing features: %s", error.strerror)

    def _remove_unused(self) -> None:
        """Of other bases, too: whoever misses one computes it again."""
        if time.time() - self._looked < _DAY:
            return
        self._looked = time.time()
        for file in self._folder.iterdir():
            with suppress(FileNotFoundError):  # another server has been faster
                if file.stat().st_mtime < time.time() - UNUSED_DAYS * _DAY:
                    file.unlink()

    def _path(self, key: str) -> Path:
        # Hashed, because a key comes from outside this package and must not name a path.
        digest = hashlib.sha256("\0".join((self._space, key)).encode()).hexdigest()
        return self._folder / f"{digest}.npy"
