"""`switchyard plan`: what a load needs, before anything is bought."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace
from typing import Annotated

import typer
from pydantic import ByteSize, TypeAdapter, ValidationError
from rich.console import Console
from rich.table import Table

from server.planning import GIB, MACHINES, Load, Machine, Model, Plan, plan
from store.errors import InvalidRequestError

out = Console()

Size = Annotated[str | None, typer.Option(help="Another size, such as 24GiB.")]


def plan_verb(
    experts: Annotated[int, typer.Option(min=1, help="How many experts there are.")],
    qps: Annotated[float, typer.Option(min=0.0, help="Requests per second, all replicas together.")] = 10.0,
    params: Annotated[str, typer.Option(help="Parameters of the base: 135M, 8B, 70B.")] = "8B",
    weight_bytes: Annotated[float, typer.Option(min=0.1, help="Bytes per parameter of the base.")] = 2.0,
    density: Annotated[float, typer.Option(min=1e-6, max=1.0, help="Share of parameters that experts move.")] = 0.05,
    resident_bits: Annotated[float | None, typer.Option(help="Bits per parameter of an expert in memory.")] = None,
    file_bits: Annotated[float | None, typer.Option(help="Bits per parameter of an expert's file.")] = None,
    kv_token_bytes: Annotated[float, typer.Option(min=1.0, help="Key/value cache per token.")] = 131_072,
    zipf: Annotated[float, typer.Option(min=0.0, help="Exponent of the experts' popularity; 0: all alike.")] = 1.0,
    base_share: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of requests for the base alone.")] = 0.0,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")] = 512,
    output: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 128,
    batch: Annotated[int, typer.Option(min=1, help="Sequences that run at once in a replica.")] = 32,
    gpu: Annotated[str, typer.Option(help=f"One of {', '.join(MACHINES)}.")] = "h100",
    memory: Size = None,
    host_memory: Size = None,
    bandwidth: Annotated[float | None, typer.Option(help="Of the device's memory, GB/s, if not the GPU's.")] = None,
    bus: Annotated[float | None, typer.Option(help="Host to device, GB/s, if not the GPU's.")] = None,
    store: Annotated[float | None, typer.Option(help="From disk or Redis, GB/s; default: 1.")] = None,
    merged_copy: Annotated[bool, typer.Option(help="Keep room for merged mode's second copy.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Say how much memory, which hit rates and how many replicas a load needs (docs/scaling.md)."""
    model = Model(_count(params), weight_bytes, density, resident_bits, file_bits, kv_token_bytes)
    load = Load(experts, zipf, qps, prompt, output, batch, base_share)
    machine = _machine(gpu, memory, host_memory, bandwidth, bus, store)
    found = plan(model, machine, load, merged_copy=merged_copy)
    if as_json:
        out.print_json(json.dumps(dataclasses.asdict(found)))
    else:
        out.print(_table(model, found))


def _machine(
    gpu: str,
    memory: str | None,
    host_memory: str | None,
    bandwidth: float | None,
    bus: float | None,
    store: float | None,
) -> Machine:
    if gpu not in MACHINES:
        raise InvalidRequestError(f"--gpu must be one of {', '.join(MACHINES)}, not {gpu}", param="gpu")
    machine = MACHINES[gpu]
    rates = {"bandwidth": bandwidth, "bus": bus, "store": store}
    sizes = {"memory": memory, "host_memory": host_memory}
    changes = {name: 1e9 * rate for name, rate in rates.items() if rate is not None}
    changes |= {name: float(_bytes(name, size)) for name, size in sizes.items() if size is not None}
    return replace(machine, **changes)


def _table(model: Model, found: Plan) -> Table:
    table = Table("what", "per replica", title=f"{found.replicas} replica{'s' if found.replicas > 1 else ''}")
    rows = (
        ("base", f"{model.base_bytes / GIB:.1f} GiB"),
        ("key/value cache", f"{found.kv_bytes / GIB:.1f} GiB"),
        ("expert: in memory / its file", f"{model.expert_bytes / 1e6:,.0f} MB / {model.file_bytes / 1e6:,.0f} MB"),
        ("device tier (--expert-bytes)", f"{found.device_experts} experts, {found.device_bytes / GIB:.1f} GiB"),
        (
            "host tier (--host-expert-bytes)",
            f"{found.host_experts} experts, {found.host_experts * model.expert_bytes / GIB:.1f} GiB",
        ),
        ("found on the device", f"{found.device_hits:.1%} ({found.blind_device_hits:.1%} without affinity)"),
        ("found in host memory", f"{found.host_hits:.1%}"),
        ("decoded from a file", f"{max(0.0, 1 - found.device_hits - found.host_hits):.1%}"),
        ("load: from host / from a file", f"{1e3 * found.warm_load:.0f} ms / {1e3 * found.cold_load:,.0f} ms"),
        ("decode step, full batch", f"{1e3 * found.step:.1f} ms with {found.experts_per_step:.1f} experts in it"),
        ("engine / loader busy", f"{found.engine_busy:.0%} / {found.loader_busy:.0%}"),
        ("most requests per second", f"{found.most_qps:.1f}"),
    )
    for row in rows:
        table.add_row(*row)
    return table


def _count(text: str) -> float:
    factor = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}.get(text[-1:].upper(), 1.0)
    try:
        count = float(text if factor == 1.0 else text[:-1]) * factor
    except ValueError:
        count = 0.0
    if not 0 < count < 1e15:
        raise InvalidRequestError(f"--params must be a number such as 135M or 8B, not {text}", param="params")
    return count


def _bytes(name: str, text: str) -> int:
    try:
        return TypeAdapter(ByteSize).validate_python(text)
    except ValidationError:
        raise InvalidRequestError(
            f"--{name.replace('_', '-')} must be a size such as 24GiB, not {text}", param=name
        ) from None
