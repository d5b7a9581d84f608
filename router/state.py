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

from router.metric import LowRank

log = logging.getLogger(__name__)

VERSION = 1
_SEAL_BYTES = hashlib.sha256().digest_size


@dataclass(frozen=True)
class Learned:
    """A metric, and the key of the library that it was fitted to."""

    library: str
    metric: LowRank


class StateFile:
    """One file: a line of JSON, a `.npy` array of the metric's origin and rows, and the sha256 of both.

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
                return Learned(header["library"], LowRank(rows[0], rows[1:]))
        except (ValueError, KeyError, TypeError, EOFError):
            pass
        log.info("the router's state is of another version or base; its metric will be fitted again")
        return None

    def save(self, learned: Learned) -> None:
        """Replace what was saved. A full or read-only disk is logged."""
        buffer = io.BytesIO()
        header = {"version": VERSION, "space": self._space, "library": learned.library}
        buffer.write(json.dumps(header).encode() + b"\n")
        np.save(buffer, np.vstack([learned.metric.origin, learned.metric.matrix]), allow_pickle=False)
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
