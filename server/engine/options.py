"""How the engine runs: what its part of the server's settings may say. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Mode(StrEnum):
    """How deltas reach the rows of a step."""

    MERGED = "merged"
    """One mix at a time, folded into the weights; mixes take turns."""
    MIXED = "mixed"
    """Rows of different mixes share steps; deltas are applied beside the weights."""
    AUTO = "auto"
    """Whichever costs less for what waits, by costs measured at start."""


class BaseWeights(StrEnum):
    """What the base's weights are kept as."""

    FULL = "full"
    """As `dtype` says."""
    INT8 = "int8"
    """Eight bits in mixed mode, a scale per row."""
    INT4 = "int4"
    """Four bits in mixed mode, a scale and an offset per 32 weights of a row."""


class CudaGraphs(StrEnum):
    """Whether decode steps are captured as CUDA graphs."""

    AUTO = "auto"
    """On a GPU, as long as capturing works; what cannot be captured runs kernel by kernel."""
    OFF = "off"


class NativeCalls(StrEnum):
    """Whether steps are one native call."""

    AUTO = "auto"
    """On a CPU, where the library can be built and the base's structure is known."""
    OFF = "off"


@dataclass(frozen=True)
class EngineSettings:
    """How the engine runs. Bytes bound every pool."""

    dtype: str = "auto"
    """"auto" (float32 on a CPU, bfloat16 on a GPU), "float32", "bfloat16" or "float16"."""
    device: str = "auto"
    """"auto" (cuda where there is one), "cpu", "cuda", "cuda:1", ..."""
    kv_bytes: int = 1 << 30
    """Memory for the key/value cache."""
    prefix_cache: bool = True
    """Whether what is in the cache of a prompt's beginning is used again, for the same mix and tenant."""
    expert_bytes: int = 2 << 30
    """Memory for decoded experts on the device."""
    host_expert_bytes: int | None = None
    """Host memory for decoded experts that are not on the device. None: none on a CPU, whose own memory it is; on a GPU
    four times `expert_bytes`."""
    merged_bytes: int = 0
    """Memory for the merged weights of hot mixes, on the device; at least that of one mix is used in merged mode."""
    mode: Mode = Mode.AUTO
    """How deltas are applied. Mixes that mixed mode cannot carry run merged all the same."""
    base_weights: BaseWeights = BaseWeights.FULL
    """What the linear layers of the base are kept as. Quantised ones can only be added to: `mode` must be mixed."""
    kernels: str = "auto"
    """Implementation of mixed mode's arithmetic, by name (`server.engine.kernels`)."""
    cuda_graphs: CudaGraphs = CudaGraphs.AUTO
    """Whether decode steps on a GPU are captured and replayed (`server.engine.graphs`)."""
    native_steps: NativeCalls = NativeCalls.AUTO
    """Whether steps on a CPU are one native call (`server.engine.native_steps`)."""
    max_batch: int = 32
    """Most sequences in one step."""
    max_queue: int = 256
    """Most requests waiting or running before `QueueFullError`."""
    step_tokens: int = 512
    """Most tokens in one step: bounds how long a long prompt can hold up running streams."""
    prefill_share: float = 0.25
    """By what part of its time a step of running streams may grow for a newcomer's prompt
    (`server.engine.prefill_budget`); 0: `step_tokens` alone bounds it."""
    turn_steps: int = 32
    """Steps a mix may run merged before another mix that waits gets its turn."""
    threads: int | None = None
    """CPU threads for torch; None leaves torch's choice."""
    feature_layer: int = 6
    """How many of the base's layers the routing features pass through."""
    feature_tokens: int = 24
    """Most tokens of a prompt that routing looks at: averaged over a long text, what is asked for is drowned by what
    it is asked about (`bench/routing.py`)."""
