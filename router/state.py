"""The learned metric on disk, beside the experts it was learned from: a restart routes as before, at once."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from router.discriminant import Discriminant
from router.features import Features
from router.metric import LowRank

log = logging.getLogger(__name__)

VERSION = 2
_SEAL_BYTES = hashlib.sha256().digest_size


@dataclass(frozen=True)
class Learned:
    """A metric, and the key of the library that it was fitted to."""

    library: str
    metric: Discriminant | LowRank


class StateFile:
    """One file: a line of JSON, a `.npy` array of the metric's parts one above the other, and the sha256 of both.

    Whatever is wrong with it, the metric is fitted again; it never raises.

    Args:
        path: its folder is made when something is saved.
        space: identifies the base, the layer and whatever else decides the features: a metric of another is not read.
    """

    def __init__(self, path: Path, space: str) -> None:
        self._path = path
        self._space = space

    def load(self) -> Learned | None:
        """What was saved last, if it is for the same features."""
        try:
            data = self._path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            log.warning("cannot read the router's state: %s", error.strerror)
            return None
        body, seal = data[:-_SEAL_BYTES], data[-_SEAL_BYTES:]
        if hashlib.sha256(body).digest() != seal:
            log.warning("the router's state is damaged; its metric will be fitted again")
            return None
        line, _, array = body.partition(b"\n")
        try:
            header = json.loads(line)
            if (header["version"], header["space"]) == (VERSION, self._space):
                rows = np.load(io.BytesIO(array), allow_pickle=False)
                return Learned(header["library"], _metric(rows, header["parts"]))
        except (ValueError, KeyError, TypeError, EOFError):
            pass
        log.info("the router's state is of another version or base; its metric will be fitted again")
        return None

    def save(self, learned: Learned) -> None:
        """Replace what was saved. A full or read-only disk is logged."""
        buffer = io.BytesIO()
        parts = _parts(learned.metric)
        header: dict[str, object] = {"version": VERSION, "space": self._space, "library": learned.library}
        header["parts"] = [len(part) for part in parts]
        buffer.write(json.dumps(header).encode() + b"\n")
        np.save(buffer, np.vstack(parts), allow_pickle=False)
        body = buffer.getvalue()
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self._path.parent, suffix=".tmp", delete=False) as file:
                scratch = Path(file.name)
                try:
                    file.write(body + hashlib.sha256(body).digest())
                    file.flush()
                    os.fsync(file.fileno())
                    os.replace(scratch, self._path)
                except BaseException:
                    scratch.unlink(missing_ok=True)
                    raise
        except OSError as error:
            log.warning("cannot save the router's state: %s", error.strerror)


def _parts(metric: Discriminant | LowRank) -> list[Features]:
    if isinstance(metric, LowRank):
        return [metric.origin[None], metric.matrix]
    return [metric.origin[None], metric.whiten, metric.background, metric.directions]


def _metric(rows: Features, lengths: list[int]) -> Discriminant | LowRank:
    """What `_parts` was given.

    Raises:
        ValueError: the lengths are not those of a metric.
    """
    if sum(lengths) != len(rows):
        raise ValueError("the parts are not as long as the whole")
    origin, *parts = np.split(rows, np.cumsum(lengths[:-1]))
    if len(parts) == 1:
        return LowRank(origin[0], parts[0])
    whiten, background, directions = parts
    return Discriminant(origin[0], whiten, background, directions)
