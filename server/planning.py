"""How much memory, which hit rates and how many replicas a load needs: arithmetic, no measurement (docs/scaling.md)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from server.popularity import Shares, distinct, divided_hit_rate, hit_rate, zipf
from store.errors import InvalidRequestError

GIB = 1 << 30
_MOST_REPLICAS = 4096


@dataclass(frozen=True)
class Model:
    """The base, and what its experts are like.

    Attributes:
        params: of the base.
        weight_bytes: per parameter of the base.
        density: share of the parameters that an expert moves.
        resident_bits: per parameter, of an expert in memory; None: by density, as `server.engine.kernels` packs.
        file_bits: per parameter, of an expert's file; None: the entropy of its positions, and a sign for each.
        kv_token_bytes: of the key/value cache per token: 2 × layers × KV heads × head size × bytes per value.
    """

    params: float = 8e9
    weight_bytes: float = 2.0
    density: float = 0.05
    resident_bits: float | None = None
    file_bits: float | None = None
    kv_token_bytes: float = 131_072

    @property
    def base_bytes(self) -> float:
        return self.params * self.weight_bytes

    @property
    def expert_bytes(self) -> float:
        """Of one expert in memory: 16 bits per nonzero below a density of 0.1, else two bit planes."""
        bits = min(2.0, 16 * self.density) if self.resident_bits is None else self.resident_bits
        return self.params * bits / 8

    @property
    def file_bytes(self) -> float:
        d = self.density
        bits = _entropy(d) + d if self.file_bits is None else self.file_bits
        return self.params * bits / 8


@dataclass(frozen=True)
class Machine:
    """One replica's device and host. Peak figures, as their makers state them.

    Attributes:
        memory: bytes of the device.
        bandwidth: of that memory, bytes per second.
        flops: dense, at the weights' precision, per second.
        bus: host to device, bytes per second.
        host_memory: bytes that the host tier may take.
        store: from disk or Redis, bytes per second.
        decode: parameters of the base per second that one thread reads, checks and decodes of an expert's file.
        efficiency: share of the peaks that is reached.
    """

    memory: float
    bandwidth: float
    flops: float
    bus: float
    host_memory: float = 0.0
    store: float = 1e9
    decode: float = 400e6
    efficiency: float = 0.6


MACHINES: Mapping[str, Machine] = {
    "h100": Machine(80e9, 3.35e12, 989e12, 55e9, 512e9),
    "h200": Machine(141e9, 4.8e12, 989e12, 55e9, 512e9),
    "a100": Machine(80e9, 2.04e12, 312e12, 25e9, 512e9),
    "l40s": Machine(48e9, 0.864e12, 362e12, 25e9, 256e9),
    "l4": Machine(24e9, 0.3e12, 121e12, 25e9, 128e9),
}
"""Dense BF16 and memory figures of NVIDIA's data sheets; the bus is what PCIe 5 or 4 × 16 gives in practice."""


@dataclass(frozen=True)
class Load:
    """What is asked for.

    Attributes:
        experts: how many there are.
        exponent: of Zipf's law for their popularity.
        qps: requests per second.
        prompt, output: tokens per request.
        batch: sequences that run at once in a replica, on the average.
        base_share: share of the requests that no expert answers.
    """

    experts: int
    exponent: float = 1.0
    qps: float = 10.0
    prompt: int = 512
    output: int = 128
    batch: int = 32
    base_share: float = 0.0


@dataclass(frozen=True)
class Plan:
    """What that comes to. Bytes and rates are per replica, rates per second.

    Attributes:
        replicas: how many it takes, none busier than `target`.
        device_experts, host_experts: how many fit into either tier.
        device_hits, host_hits: shares of all requests for experts that find theirs on the device, or not there but in
            host memory. The rest decode a file.
        blind_device_hits: what `device_hits` would be if requests went to any replica.
        step: seconds of a decode step.
        experts_per_step: different experts in a full batch.
        most_qps: what one replica answers at most, of these requests.
        engine_busy, loader_busy: shares of the time.
        warm_load, cold_load: seconds until an expert is on the device, from host memory and from its file.
    """

    replicas: int
    device_bytes: float
    kv_bytes: float
    device_experts: int
    host_experts: int
    device_hits: float
    host_hits: float
    blind_device_hits: float
    step: float
    experts_per_step: float
    most_qps: float
    engine_busy: float
    loader_busy: float
    warm_load: float
    cold_load: float


def plan(model: Model, machine: Machine, load: Load, *, target: float = 0.7, merged_copy: bool = True) -> Plan:
    """The smallest number of replicas that carries a load, each replica keeping to its own share of the experts.

    Args:
        target: how busy engine and loader may be.
        merged_copy: keep room for the second copy of the weights that merged mode builds.

    Raises:
        InvalidRequestError: base and cache leave no room for an expert, or no number of replicas is enough.
    """
    kv = load.batch * (load.prompt + load.output) * model.kv_token_bytes
    left = 0.92 * machine.memory - model.base_bytes * (2 if merged_copy else 1) - kv
    room = min(load.experts, math.floor(left / model.expert_bytes))
    if room < 1:
        raise InvalidRequestError(
            f"base, cache and merged weights leave {left / GIB:.1f} GiB on the device; one expert takes "
            f"{model.expert_bytes / GIB:.1f}: take a larger device, a smaller batch, or --no-merged-copy (mode=mixed)"
        )
    hosted = min(load.experts, math.floor(machine.host_memory / model.expert_bytes))
    everybody = zipf(load.experts, load.exponent)
    step, together = _step(model, machine, load, everybody)
    prefill = 2 * model.params * load.prompt / (machine.flops * machine.efficiency)
    seconds = prefill + load.output * step / load.batch
    warm = model.expert_bytes / machine.bus
    cold = model.file_bytes / machine.store + model.params / machine.decode
    for replicas in range(1, _MOST_REPLICAS + 1):
        on_device = divided_hit_rate(everybody, room, replicas)
        in_host = max(0.0, divided_hit_rate(everybody, hosted, replicas) - on_device)
        missed = 1.0 - on_device - in_host
        qps = load.qps / replicas
        engine_busy = qps * seconds
        loader_busy = qps * (1 - load.base_share) * ((in_host + missed) * warm + missed * cold)
        if max(engine_busy, loader_busy) <= target:
            return Plan(
                replicas, room * model.expert_bytes, kv, room, hosted, on_device, in_host, hit_rate(everybody, room),
                step, together, target / seconds, engine_busy, loader_busy, warm, warm + cold,
            )  # fmt: skip
    raise InvalidRequestError(f"not even {_MOST_REPLICAS} replicas would be enough")


def _step(model: Model, machine: Machine, load: Load, shares: Shares) -> tuple[float, float]:
    """Seconds of a decode step in mixed mode, and the different experts in it.

    It reads the base once, every distinct expert once, and each row's cache (docs/scaling.md).
    """
    together = distinct(shares, max(1, round(load.batch * (1 - load.base_share))))
    cache = load.batch * (load.prompt + load.output / 2) * model.kv_token_bytes
    read = model.base_bytes + together * model.expert_bytes + cache
    return read / (machine.bandwidth * machine.efficiency), together


def _entropy(share: float) -> float:
    """Bits per position of a random choice."""
    if not 0 < share < 1:
        return 0.0
    return -(share * math.log2(share) + (1 - share) * math.log2(1 - share))
