"""When an answer is its fine-tune's bit by bit: of what overwrites, alone, at weight 1, in a type that holds it."""

from __future__ import annotations

import pytest

from server.composing import compose
from store.lineage import Lineage
from store.patterns import Half
from store.record import ExpertRecord, record_from_json, record_to_json
from store.strict_json import Fields, parse_json

BASE = "0" * 64


def record(name: str, *, exact: bool = False, half: Half | None = None) -> ExpertRecord:
    return ExpertRecord(
        name=name, digest=f"{ord(name):064x}", bytes=1, created=0, base_fingerprint=BASE, codec="any", density=0.1,
        bits_per_param=0.1, description="", exemplar_count=0, exemplars_digest=None, exact=exact, half=half,
    )  # fmt: skip


B, F = record("b", exact=True, half=Half.BF16), record("f", exact=True, half=Half.F16)
OLD, LOSSY = record("o", exact=True), record("l")


def exact(dtype: str, *chosen: tuple[ExpertRecord, float]) -> bool | None:
    lineage = Lineage([B, F, OLD, LOSSY], lambda _: True, BASE)
    return compose(lineage, dtype, [(one.name, one.digest, weight) for one, weight in chosen], "mix_requested").exact


@pytest.mark.parametrize(
    ("one", "types"),
    [
        (B, {"float32", "bfloat16"}),
        (F, {"float32", "float16"}),
        (OLD, {"float32"}),  # published before the type was kept: only what holds both is certain
    ],
)
def test_a_type_that_holds_the_weights(one: ExpertRecord, types: set[str]) -> None:
    assert {dtype for dtype in ("float32", "bfloat16", "float16") if exact(dtype, (one, 1.0))} == types
    assert exact("float64", (one, 1.0)) is False


def test_alone_and_at_weight_1() -> None:
    assert exact("bfloat16", (B, 0.5)) is False
    assert exact("bfloat16", (B, 0.5), (B, 0.5)) is True
    assert exact("bfloat16", (B, 1.0), (F, 1.0)) is False
    assert exact("float32", (B, 1.0), (LOSSY, 1.0)) is False
    assert exact("float32", (LOSSY, 1.0)) is None


@pytest.mark.parametrize("one", [B, F, OLD, LOSSY])
def test_a_record_keeps_the_type(one: ExpertRecord) -> None:
    written = record_to_json(one)
    assert record_from_json(one.name, Fields(parse_json(written, "record"), "record")) == one
    assert (b'"half"' in written) == (one.half is not None)
