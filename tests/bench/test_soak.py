"""The soak finds what it is there to find; half a minute of it is a slow test."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from bench.soak import Gauge, disagreements, soak
from bench.soak_oracle import Names, Oracle
from store.mix import BASE_MIX, Mix


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    return Oracle(tmp_path_factory.mktemp("oracle"), 2)


def test_an_answer_of_another_version_is_wrong(oracle: Oracle) -> None:
    prompt = oracle.encode("a river", chat=True)
    ours, other = (Mix.of({digest: 1.0}) for digest in oracle.digests)
    tokens = oracle.greedy(ours, prompt, 12)
    text = oracle.tokenizer.decode(tokens, skip_special_tokens=True)
    assert oracle.judge(ours, prompt, 12, text, None).word == "right"
    for mix in (other, BASE_MIX, Mix.of({oracle.digests[0]: 0.5})):
        assert oracle.judge(mix, prompt, 12, text, None).word == "wrong"
    assert oracle.judge(ours, prompt, 12, text[:-2], None).word == "wrong"


def test_the_same_text_of_other_tokens_is_wrong(oracle: Oracle) -> None:
    prompt = oracle.encode("a river", chat=False)
    tokens = oracle.greedy(BASE_MIX, prompt, 6)
    text = oracle.tokenizer.decode(tokens, skip_special_tokens=True)
    pieces = [bytes([b"?"[0]])] * len(tokens)
    assert oracle.judge(BASE_MIX, prompt, 6, text, pieces).word == "wrong"


def test_a_name_means_either_while_it_changes_and_no_longer() -> None:
    names = Names()
    assert names.possible("a", 0.0, 1e12) == {None}
    with names.change("a", "one"):
        assert names.possible("a", 0.0, 1e12) == {None, "one"}
    with names.change("a", "two"):
        pass
    assert names.current("a") == "two"
    assert names.possible("a", 1e12, 1e12) == {"two"}
    assert names.possible("a", 0.0, 1e12) == {None, "one", "two"}


def view(**changed: Any) -> dict[str, Any]:
    tier = {"tier": "device", "used_bytes": 5, "limit_bytes": 9, "experts": 1, "loads": 3, "evictions": 2, "faults": 0}
    stats = {"running": 0, "waiting": 0, "kv_bytes_used": 0, "tiers": [tier | changed]}
    return {"stats": stats, "experts": [{"digest": "d", "bytes": 5, "used_by": 0}], "waiting_for_experts": []}


def test_counters_that_disagree_are_found() -> None:
    assert disagreements(view()) == []
    for changed in ({"used_bytes": 10}, {"experts": 2}, {"evictions": 3}, {"faults": 1}):
        assert disagreements(view(**changed))
    busy = view()
    busy["experts"][0]["used_by"] = 1
    busy["stats"]["running"] = 1
    assert len(disagreements(busy)) == 2


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["auto", "merged"])
def test_half_a_minute(mode: str, tmp_path: Path) -> None:
    rows, bars = soak(0.4, 4, 1, mode)
    assert all(bar["met"] for bar in bars), (bars, rows[-1])


def test_a_leak_is_told_from_a_step() -> None:
    """Memory that grows with time has a slope; one that grows once has none."""
    leaking, stepping = (Gauge(1, 1.0, threading.Event()) for _ in range(2))
    for i in range(90):
        leaking.samples.append((20.0 * i, (600 << 20) + i * (1 << 17), 10, 10))
        stepping.samples.append((20.0 * i, (600 << 20) + (i > 50) * (4 << 20) + i * 1000, 10, 10))
    assert leaking.slope() == pytest.approx(3 / 8)
    assert stepping.slope() < 0.01
