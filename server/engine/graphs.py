"""Decode steps under CUDA graphs: one launch for a whole step, whose kernels read everything from fixed tensors.

A step of one token per row is a function of tensors at fixed addresses: token ids, positions, slots, lengths, block
tables. Batches are padded to a few sizes and block tables to a few widths, and for each pair the function is captured
once and replayed with other contents from then on. Run without capturing it computes the same, which is what tests on
a CPU do.

Steps of the base alone have graphs of their own, with no trace of experts in them. Steps with experts beside the base
find these in tensors that are rewritten in place (`server.engine.mixed_graphs`). In merged mode a graph belongs to
the set of buffers that the parameters point at; mixes built in the same buffers, one after the other, share it.
What is no plain decode step runs as ever: prompts, likelihoods of prompts, whatever cannot be captured. So does a step
that the memory does not suffice to capture, and some of those after it, until it is tried again.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace

import numpy as np
import torch

from server.engine.attention import Decodes, Segment, SlotBatch
from server.engine.bus import on, own_stream
from server.engine.forwards import running
from server.engine.kernels import Kernels
from server.engine.kv_cache import BLOCK_TOKENS, NULL_BLOCK, KVCache
from server.engine.layout import Layout
from server.engine.mixed import Terms
from server.engine.mixed_graphs import Form, HeldTerms, MixedForms
from server.engine.model import BaseModel
from server.engine.options import CudaGraphs

log = logging.getLogger(__name__)

Step = Callable[[], None]
Capture = Callable[[Step], Step]
"""Makes something that does what a step does, reading and writing the same tensors; may run it meanwhile."""

_LEAST_WIDTH = 16
"""Blocks of the narrowest block table: 256 tokens. Wider ones double, so at most half of what attention reads is
padding."""
_MOST_GRAPHS = 64
"""Kept at a time, the least recently used goes first: each takes some megabytes for its nodes."""
_WARM_UPS = 2
"""Runs before a capture: what is compiled, chosen or allocated once must not be captured."""
_NO_MEMORY = ("out of memory", "OUT_OF_MEMORY", "ALLOC_FAILED")
"""How CUDA, its driver and cuBLAS say it, where torch does not."""
_FIRST_PAUSE = 16
"""Steps without a graph for which none is tried after memory did not suffice; twice as many after every other time."""


def padded_rows(count: int, most: int) -> int:
    """The batch size that `count` rows are padded to: 1, 2, 4, 8, then multiples of 8, but no more than `most`."""
    size = 1 << (count - 1).bit_length() if count <= 8 else -(-count // 8) * 8
    return max(count, min(size, most))


def padded_width(blocks: int, most: int) -> int:
    """The width of the block table that `blocks` are padded to: 16, doubled as often as needed, or `most`."""
    size = max(_LEAST_WIDTH, 1 << (blocks - 1).bit_length())
    return max(blocks, min(size, most))


class StepInputs:
    """The tensors that a decode step of so many rows reads, filled anew for every step and never moved.

    Attributes:
        ids, positions, slots, lengths: `[rows]` int64 on the device.
        table: `[rows, width]` int64 on the device.
    """

    def __init__(self, rows: int, width: int, scratch_slot: int, device: torch.device) -> None:
        """Args:
        scratch_slot: where padding rows write their keys and values.
        """
        self._scratch_slot = scratch_slot
        size = rows * (4 + width)
        # Filled on the host and sent in one piece. The host may write again once the step's tokens are sampled.
        self._host = torch.zeros(size, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._device = torch.zeros(size, dtype=torch.int64, device=device)
        values = self._host.numpy()
        self._heads, self._tables = values[: 4 * rows].reshape(4, rows), values[4 * rows :].reshape(rows, width)
        self.ids, self.positions, self.slots, self.lengths = self._device[: 4 * rows].view(4, rows)
        self.table = self._device[4 * rows :].view(rows, width)

    def fill(self, tokens: Items[int], segments: Items[Segment]) -> None:
        """Take in a step: a token and a segment of one row each, no more of them than rows."""
        count = len(tokens)
        places = [s.context for s in segments]
        self._heads[:, :count] = (
            tokens,
            places,
            [
                s.blocks[p // BLOCK_TOKENS] * BLOCK_TOKENS + p % BLOCK_TOKENS
                for s, p in zip(segments, places, strict=True)
            ],
            [s.length for s in segments],
        )
        # Padding rows see one key, of zeros: what they compute is finite, and nobody asks for it.
        self._heads[:, count:] = np.array([[0], [0], [self._scratch_slot], [1]])
        self._tables[:] = NULL_BLOCK
        for table, segment in zip(self._tables, segments, strict=False):
            blocks = segment.blocks[: len(table)]
            table[: len(blocks)] = blocks
        self._device.copy_(self._host, non_blocking=True)


@dataclass(frozen=True)
class Captured:
    """A step that can be run again and again, and the tensors that it reads."""

    inputs: StepInputs
    held: HeldTerms | None
    replay: Step


class DecodeGraphs:
    """Runs decode steps over fixed tensors, captured once for each padded shape and set of parameters.

    Attributes:
        replays: steps run so far.
        captures: how often a step had to be captured.
    """

    def __init__(
        self, model: BaseModel, cache: KVCache, max_batch: int, capture: Capture, kernels: Kernels | None = None
    ) -> None:
        """Args:
        kernels: Triton's, if steps with experts are to be captured too.
        max_batch: most rows of a step.
        capture: `CudaGraphs`' on a GPU; `eagerly` runs the same steps without.
        """
        self._model = model
        self._cache = cache
        self._max_batch = max_batch
        self._capture: Capture | None = capture
        self._forms = None if kernels is None else MixedForms(kernels, max_batch)
        self._most_blocks = min(-(-model.context_length // BLOCK_TOKENS), cache.total_blocks)
        self._captured: OrderedDict[Hashable, Captured] = OrderedDict()
        self._logits = torch.empty(max_batch, model.vocabulary, dtype=torch.float32, device=model.device)
        self._pause = _FIRST_PAUSE
        self._resting = 0
        """Steps for which no capture will be tried."""
        self.replays = self.captures = 0

    @torch.inference_mode()
    def run(self, layout: Layout, moved: frozenset[tuple[str, int]], terms: Terms | None = None) -> torch.Tensor | None:
        """A decode step with the parameters as they are.

        Args:
            moved: names of the parameters that point elsewhere than at the pristine weights, and these addresses.
            terms: what is added beside the weights.

        Returns:
            `[rows, vocabulary]` float32, until the next step; None if this is no such step, none can be captured, or
            memory does not suffice: nothing has changed then.
        """
        if self._capture is None or not self.fits(layout):
            return None
        rows = padded_rows(len(layout.tokens), self._max_batch)
        width = padded_width(max(-(-s.length // BLOCK_TOKENS) for s in layout.segments), self._most_blocks)
        form: Form | None = None
        if terms is not None:
            form = None if self._forms is None else self._forms.of(terms)
            if form is None:
                return None
        key = (rows, width, moved, None if form is None else form.key)
        known = self._captured.get(key)
        if known is None and self._resting > 0:
            self._resting -= 1
            return None
        try:
            step = known or self._hold(rows, width, terms, form)
            step.inputs.fill(layout.tokens, layout.segments)
            if step.held is not None and terms is not None and form is not None:
                step.held.fill(terms, form, step.inputs.ids)
            if known is None and not self._keep(key, step):
                return None
        except Exception as error:
            if not lacks_memory(error):
                raise
            self._rest()
            return None
        self._captured.move_to_end(key)
        self._captured[key].replay()
        self.replays += 1
        return self._logits[: len(layout.tokens)]

    def counts(self) -> dict[str, int]:
        """For people: graphs that are kept, captures and replays so far."""
        return {"kept": len(self._captured), "captures": self.captures, "replays": self.replays}

    def fits(self, layout: Layout) -> bool:
        """Whether every row is a sequence's next token, and nothing but what follows it is asked for."""
        count = len(layout.tokens)
        return count == len(layout.segments) <= self._max_batch and layout.logit_rows == list(range(count))

    def _hold(self, rows: int, width: int, terms: Terms | None, form: Form | None) -> Captured:
        """The tensors of a step of that shape, and the step as it is."""
        device = self._model.device
        inputs = StepInputs(rows, width, self._cache.scratch_slot, device)
        held = None
        if terms is not None and form is not None and self._forms is not None:
            held = HeldTerms(terms, form, rows, self._forms, device)
        plan = [] if held is None else held.plan

        def step() -> None:
            # Masks are kept in the layout: a new one each time, for they depend on the lengths.
            batch = SlotBatch(self._cache, inputs.slots, Decodes(inputs.table, inputs.lengths))
            with running(plan):
                self._logits[:rows].copy_(self._model.decode(inputs.ids, inputs.positions, batch))

        return Captured(inputs, held, step)

    def _keep(self, key: Hashable, step: Captured) -> bool:
        """Capture a step, its tensors filled; False if it cannot be. Raises what a lack of memory does."""
        assert self._capture is not None
        try:
            self._captured[key] = replace(step, replay=self._capture(step.replay))
        except Exception as error:
            if lacks_memory(error):
                raise
            log.exception("a decode step could not be captured; from now on steps run kernel by kernel")
            self._capture = None
            self._captured.clear()
            return False
        self.captures += 1
        self._pause = _FIRST_PAUSE
        if len(self._captured) > _MOST_GRAPHS:
            self._captured.popitem(last=False)
        return True

    def _rest(self) -> None:
        """Try no capture for a while, and for twice as long the next time: each costs steps, and what torch keeps."""
        self._resting, self._pause = self._pause, 2 * self._pause
        log.warning("no memory for a decode step's graph; the next %d without one run kernel by kernel", self._resting)


def lacks_memory(error: BaseException | None) -> bool:
    """Whether memory of the device was missing: torch's, or a driver's for a graph. A capture that is cut off may fail
    again where it ends; what it was cut off by counts."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in _NO_MEMORY):
            return True
        error = error.__cause__ or error.__context__
    return False


def eagerly(step: Step) -> Step:
    """No capture: the step itself."""
    return step


class GraphCapture:
    """Captures steps on a CUDA device, all of them in one pool of memory: they never run at the same time, and what one
    leaves outside of its fixed tensors is not read after the next has begun. And on one stream, for torch gives memory
    of a pool to the stream again that it was taken for, and keeps some for the products of every stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = own_stream("captures", device)

    def __call__(self, step: Step) -> Step:
        stream, current = self._stream, torch.cuda.current_stream(self._device)
        stream.wait_stream(current)
        # Where a capture fails at its end, `graph` leaves the thread on its stream.
        with on(stream):
            try:
                for _ in range(_WARM_UPS):
                    step()
            finally:  # kernels share memory among steps
                current.wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            try:
                # Other threads load experts meanwhile, which must not end the capture.
                with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
                    step()
            except Exception:
                # A pool takes no more if its only graph has gone, or the end of a capture has failed.
                self._pool = torch.cuda.graph_pool_handle()
                raise
        return graph.replay


def decode_graphs(
    wanted: CudaGraphs, model: BaseModel, cache: KVCache, max_batch: int, kernels: Kernels
) -> DecodeGraphs | None:
    """What runs decode steps, where graphs are wanted and there is a GPU."""
    if wanted is CudaGraphs.OFF or model.device.type != "cuda":
        return None
    tables = kernels if kernels.name == "triton" else None
    return DecodeGraphs(model, cache, max_batch, GraphCapture(model.device), tables)
