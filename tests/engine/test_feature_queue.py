"""Whose features are computed when: routing first, embeddings of tenants in turn, and nothing for nobody."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from server.engine.feature_queue import FeatureQueue, Job
from server.engine.prefill_budget import PrefillBudget
from store.errors import SwitchyardError

pytestmark = pytest.mark.anyio

STEP = 8


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


class Computer:
    """In place of a model: notes the batches, prompt by prompt by its first token."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []

    def features(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        self.batches.append([prompt[0] for prompt in prompts])
        return torch.tensor([[float(prompt[0])] for prompt in prompts])


class AtOnce:
    """In place of an outbox: the event loop is here."""

    def call(self, function: Callable[..., None], *arguments: Any) -> None:
        function(*arguments)


@pytest.fixture
def model() -> Computer:
    return Computer()


@pytest.fixture
def queue(model: Computer) -> FeatureQueue:
    return FeatureQueue(model, AtOnce(), PrefillBudget(0.25), STEP)  # type: ignore[arg-type]


def jobs(*firsts: int, length: int = 4) -> list[Job]:
    return [([first] * length, asyncio.get_running_loop().create_future()) for first in firsts]


def serve(queue: FeatureQueue) -> None:
    for _ in range(100):
        queue.serve(decoding=0, held=0)
    assert queue.empty


async def test_routing_goes_before_embeddings(queue: FeatureQueue, model: Computer) -> None:
    queue.add_embeddings(jobs(*range(10, 20)), "acme")
    queue.serve(decoding=0, held=0)
    queue.add(routed := jobs(1, 2))
    queue.serve(decoding=0, held=0)
    assert [future.result().tolist() for _, future in routed] == [[1.0], [2.0]]
    assert model.batches == [[10, 11], [1, 2]]
    serve(queue)
    assert model.batches[2:] == [[12, 13], [14, 15], [16, 17], [18, 19]]


async def test_embeddings_come_at_all(queue: FeatureQueue, model: Computer) -> None:
    queue.add_embeddings(jobs(10), "acme")
    queue.add(jobs(*range(100, 120)))
    serve(queue)
    assert model.batches.index([10]) == 4
    queue.add(jobs(*range(100, 120)))
    queue.add_embeddings(jobs(11), "acme")
    serve(queue)
    assert model.batches[11:].index([11]) == 4


async def test_tenants_have_theirs_in_turn(queue: FeatureQueue, model: Computer) -> None:
    queue.add_embeddings(jobs(*range(10, 15)), "acme")
    queue.add_embeddings(jobs(20, 21), "globex")
    queue.add_embeddings(jobs(30, length=20), None)
    serve(queue)
    assert model.batches == [[10, 20], [30], [11, 21], [12, 13], [14]], "what is longer than a step runs alone"


async def test_nothing_is_computed_for_who_has_gone(queue: FeatureQueue, model: Computer) -> None:
    gone, routed, waiting = jobs(*range(10, 20)), jobs(1, 2), jobs(20)
    queue.add_embeddings(gone, "acme")
    queue.add_embeddings(waiting, "acme")
    queue.add(routed)
    for _, future in [*gone, routed[0]]:
        future.cancel()
    serve(queue)
    assert model.batches == [[2], [20]]
    queue.add_embeddings(gone, "acme")
    serve(queue)
    assert model.batches == [[2], [20]]


async def test_everyone_is_told_of_the_end(queue: FeatureQueue) -> None:
    told = [*jobs(1), *jobs(2), *jobs(3)]
    queue.add(told[:1])
    queue.add_embeddings(told[1:2], "acme")
    queue.add_embeddings(told[2:], None)
    queue.fail(SwitchyardError("the end"))
    assert queue.empty
    for _, future in told:
        with pytest.raises(SwitchyardError, match="the end"):
            await future
