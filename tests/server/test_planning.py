"""Plans: hit rates against a simulated cache, and what a plan must never get the wrong way round."""

from __future__ import annotations

import json
from collections import OrderedDict
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from server.cli import app
from server.planning import MACHINES, Load, Machine, Model, plan
from server.popularity import distinct, divided_hit_rate, hit_rate, zipf
from store.errors import InvalidRequestError

H100 = MACHINES["h100"]


def simulated(exponent: float, experts: int, room: int) -> float:
    """An LRU cache, step by step."""
    rng = np.random.default_rng(1)
    cache: OrderedDict[int, None] = OrderedDict()
    hits, requests = 0, 60_000
    for i, thing in enumerate(rng.choice(experts, size=requests, p=zipf(experts, exponent))):
        if thing in cache:
            hits += i >= requests // 2
            cache.move_to_end(thing)
        else:
            cache[thing] = None
            if len(cache) > room:
                cache.popitem(last=False)
    return hits / (requests // 2)


@pytest.mark.parametrize(("exponent", "room"), [(0.0, 10), (0.7, 30), (1.0, 10), (1.0, 50), (1.5, 5)])
def test_hit_rates_are_those_of_a_real_cache(exponent: float, room: int) -> None:
    assert hit_rate(zipf(100, exponent), room) == pytest.approx(simulated(exponent, 100, room), abs=0.015)


@given(st.integers(1, 300), st.floats(0, 3), st.integers(0, 300), st.integers(1, 8))
def test_hit_rates_are_shares_and_grow_with_room(experts: int, exponent: float, room: int, caches: int) -> None:
    shares = zipf(experts, exponent)
    assert shares.sum() == pytest.approx(1.0)
    less, more = (divided_hit_rate(shares, size, caches) for size in (room, room + 1))
    assert 0 <= less <= more + 1e-9 <= 1 + 2e-9
    assert hit_rate(shares, experts) == 1.0
    assert hit_rate(shares, room) <= divided_hit_rate(shares, room, caches) + 0.02, "together they have more room"


@given(st.integers(1, 200), st.floats(0, 2), st.integers(1, 64))
def test_different_experts_of_a_batch(experts: int, exponent: float, batch: int) -> None:
    assert 0.99 <= distinct(zipf(experts, exponent), batch) <= min(experts, batch) + 1e-6


def test_a_plan_by_hand() -> None:
    model = Model(params=1e9, weight_bytes=2, density=0.05, kv_token_bytes=1000, file_bits=0.5)
    machine = Machine(10e9, 1e12, 1e14, 1e10, host_memory=1e9, store=1e9, decode=1e9, efficiency=1.0)
    found = plan(model, machine, Load(1, qps=1, prompt=100, output=100, batch=10))
    assert model.expert_bytes == 1e8
    assert found.kv_bytes == 2e6
    assert (found.replicas, found.device_experts, found.host_experts) == (1, 1, 1)
    assert (found.device_hits, found.host_hits) == (1.0, 0.0)
    assert found.warm_load == 0.01
    assert found.cold_load == pytest.approx(0.01 + 0.0625 + 1.0)
    assert found.step == pytest.approx((2e9 + 1e8 + 10 * 150 * 1000) / 1e12)
    assert found.most_qps == pytest.approx(0.7 / (2 * 1e9 * 100 / 1e14 + 100 * found.step / 10))


def test_more_of_anything_is_never_worse() -> None:
    model, load = Model(), Load(experts=500, qps=40)
    first = plan(model, H100, load)
    assert plan(model, H100, replace(load, qps=80)).replicas > first.replicas
    assert plan(model, replace(H100, bandwidth=2 * H100.bandwidth), load).replicas <= first.replicas
    assert plan(model, MACHINES["h200"], load).device_experts > first.device_experts
    assert plan(replace(model, density=0.01), H100, load).device_hits > first.device_hits
    assert first.device_hits > first.blind_device_hits, "each replica keeps to its own share"
    assert plan(model, H100, load, merged_copy=False).device_experts > first.device_experts


def test_cold_experts_may_be_what_replicas_are_for() -> None:
    """Without host memory every miss decodes a file, on one thread."""
    load = Load(experts=2000, exponent=0.3, qps=1.0)
    with_host, without = plan(Model(), replace(H100, host_memory=2e12), load), plan(Model(), H100, load)
    assert with_host.loader_busy < 0.1
    assert without.replicas > with_host.replicas


def test_what_does_not_fit_is_said() -> None:
    with pytest.raises(InvalidRequestError, match="one expert takes"):
        plan(Model(params=70e9), H100, Load(10))
    with pytest.raises(InvalidRequestError, match="replicas"):
        plan(Model(), H100, Load(10, qps=1e9))


def test_the_verb() -> None:
    run = CliRunner().invoke(app, ["plan", "--experts", "100", "--params", "135M", "--gpu", "l4", "--json"])
    assert run.exit_code == 0, run.output
    assert json.loads(run.output)["device_hits"] == 1.0
    table = CliRunner().invoke(app, ["plan", "--experts", "1000", "--memory", "48GiB", "--bus", "12"])
    assert "without affinity" in table.output
    for wrong, said in ((["--params", "big"], "135M"), (["--gpu", "abacus"], "h100"), (["--memory", "x"], "24GiB")):
        failed = CliRunner().invoke(app, ["plan", "--experts", "1", *wrong])
        assert isinstance(failed.exception, InvalidRequestError)
        assert said in failed.exception.message
