"""Steps on a CPU as one call of native code, for networks whose structure `server.engine.outline` knows.

transformers' own modules spend most of a small step between products: some twenty calls per layer, each of which
starts its threads anew. Here all threads go through the whole step side by side (`step.cpp`), with experts beside the
base as the kernels of mixed mode apply them. It computes what the modules compute, but rounds less: in bfloat16 only
what products read is rounded, and what the cache keeps. What it cannot do, and steps of very many rows, run through
the modules as ever.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch

from server.engine.attention import AttentionBatch, Segment
from server.engine.kernels.cpu import CpuKernels
from server.engine.kv_cache import BLOCK_TOKENS, KVCache
from server.engine.layout import Layout
from server.engine.mixed import Terms
from server.engine.model import BaseModel
from server.engine.native_terms import Beside, NativeTerms
from server.engine.options import NativeCalls
from server.engine.outline import UnknownNetworkError, outline_of
from server.engine.programs import DTYPES, RECORD, Program, Records

log = logging.getLogger(__name__)

MOST_ROWS = 512
"""Rows up to which this has been found faster than modules: at as many it takes two thirds of their time."""
_SMALL = 1 << 22
"""Multiplications of a step up to which one thread is done before others are awake, and have waited for each other."""
_KEPT = 8
"""Sets of merged weights whose addresses are kept."""
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05}
_TRIAL_TOKENS = 21


class NativeSteps:
    """Runs steps of up to `MOST_ROWS` rows over a cache.

    Attributes:
        kernels: what they are written in.
        steps: run so far.
    """

    def __init__(self, model: BaseModel, cache: KVCache, kernels: CpuKernels) -> None:
        """Raises UnknownNetworkError if this cannot run the model; whether it computes the same is not looked at."""
        if model.device.type != "cpu" or model.dtype not in DTYPES:
            raise UnknownNetworkError(f"steps of {model.dtype} on {model.device} are not known")
        self._outline = outline_of(model.network)
        self._cache = cache
        self.kernels = kernels
        self._program = Program(self._outline, cache, MOST_ROWS)
        self._records: OrderedDict[frozenset[tuple[str, int]], Records] = OrderedDict()
        self._beside: WeakKeyDictionary[Terms, Beside | None] = WeakKeyDictionary()
        self._terms: NativeTerms | None = None
        self.steps = 0
        if kernels.operation_bytes != RECORD.itemsize:
            raise UnknownNetworkError("records and the library differ")

    def counts(self) -> dict[str, int]:
        """For people: steps so far."""
        return {"steps": self.steps}

    def fits(self, layout: Layout) -> bool:
        """Whether it has so few rows."""
        return 0 < len(layout.tokens) <= MOST_ROWS

    def run(self, layout: Layout, moved: frozenset[tuple[str, int]], terms: Terms | None = None) -> torch.Tensor | None:
        """One step with the parameters as they are.

        Args:
            moved: names of the parameters that point elsewhere than at the pristine weights, and these addresses.
            terms: what is added beside the weights.

        Returns:
            `[logit rows, vocabulary]` float32, until the next step; None if it cannot be run: nothing has changed then.
        """
        if not self.fits(layout):
            return None
        # One after the other: the second may fail for want of memory once the first has changed addresses.
        if self._program.see(max(segment.length for segment in layout.segments)):
            self._forget()
        if self._program.answer(len(layout.logit_rows)):
            self._forget()
        records = self._pointed(moved)
        if terms is not None:
            if terms not in self._beside:
                if self._terms is None:
                    self._terms = NativeTerms(self._program, terms.weights, self.kernels)
                self._beside[terms] = self._terms.beside(terms, records)
            beside = self._beside[terms]
            if beside is None:
                return None
            records = beside.records
        rows, wanted = len(layout.tokens), len(layout.logit_rows)
        tokens, picked = np.array(layout.tokens, np.int64), np.array(layout.logit_rows, np.int64)
        records["rows"] = rows
        records["which"][0] = tokens.ctypes.data
        records["rows"][-self._program.tail :] = wanted
        records["picked"][-self._program.tail] = picked.ctypes.data
        is_small = self._program.weights * rows < _SMALL
        threads = 1 if is_small else torch.get_num_threads()
        taken = self.kernels.step(records, *_places(layout.segments), threads)
        if terms is not None:
            terms.weights.seconds += taken
        self.steps += 1
        return self._program.logits[:wanted]

    def try_out(self, rows: int) -> None:
        """Run so many arbitrary tokens of the base, each alone, and compute their logits; before the cache is used."""
        segments = [Segment(row, row + 1, 0, (1,)) for row in range(rows)]
        self.run(Layout([0] * rows, segments, list(range(rows)), [], (), ()), frozenset())

    def _forget(self) -> None:
        self._records.clear()
        self._beside.clear()

    def _pointed(self, moved: frozenset[tuple[str, int]]) -> Records:
        records = self._records.get(moved)
        if records is None:
            records = self._records[moved] = self._program.records()
            if len(self._records) > _KEPT:
                self._records.popitem(last=False)
        self._records.move_to_end(moved)
        return records


def _places(
    segments: list[Segment],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int32]]:
    """Positions, slots and sequences of all rows, `[rows]` each, and block tables, `[sequences, blocks]`."""
    counts = [-(-s.length // BLOCK_TOKENS) for s in segments]
    tables = np.zeros((len(segments), max(counts)), np.int32)
    for table, segment, count in zip(tables, segments, counts, strict=True):
        table[:count] = segment.blocks[:count]
    positions = np.array([p for s in segments for p in range(s.context, s.length)], np.int64)
    sequences = np.array([i for i, s in enumerate(segments) for _ in range(s.start, s.stop)], np.int64)
    slots = tables[sequences, positions // BLOCK_TOKENS].astype(np.int64) * BLOCK_TOKENS + positions % BLOCK_TOKENS
    return positions, slots, sequences, tables


def native_steps(wanted: NativeCalls, model: BaseModel, cache: KVCache, kernels: object) -> NativeSteps | None:
    """What runs steps natively, where that is wanted, the kernels are the CPU's and it computes what the model does."""
    if wanted is NativeCalls.OFF or not isinstance(kernels, CpuKernels):
        return None
    try:
        error = _trial(model, kernels)
        if not error < _TOLERANCE[model.dtype]:
            raise UnknownNetworkError(f"what comes out differs by {error:.2g}")
        steps = NativeSteps(model, cache, kernels)
    except UnknownNetworkError as reason:
        log.info("steps run module by module: %s", reason)
        return None
    log.info("steps of up to %d rows are one native call", MOST_ROWS)
    return steps


def _trial(model: BaseModel, kernels: CpuKernels) -> float:
    """How far a prompt's logits, and then those of one more token, are from what the modules compute, relatively."""
    shape = model.kv_shape
    caches = [KVCache(shape, 4 * shape.block_bytes, model.device) for _ in range(2)]
    steps = NativeSteps(model, caches[1], kernels)
    ids = torch.randint(model.vocabulary, (_TRIAL_TOKENS + 1,), generator=torch.Generator().manual_seed(0)).tolist()
    errors = []
    for first, last in ((0, _TRIAL_TOKENS), (_TRIAL_TOKENS, _TRIAL_TOKENS + 1)):
        tokens, rows = ids[first:last], list(range(last - first))
        segments = [Segment(0, last - first, first, (2, 1))]
        expected = model.forward(tokens, AttentionBatch(segments, caches[0], model.device), rows)
        made = steps.run(Layout(tokens, segments, rows, [], (), ()), frozenset())
        assert made is not None
        errors.append(float((made - expected).norm() / expected.norm()))
    return max(errors)
