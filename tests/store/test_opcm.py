"""OPCM against its formulas, written out with full decompositions."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from store.opcm import Deltas, opcm, projected

SHAPES: dict[str, tuple[int, ...]] = {"wide": (6, 9), "tall": (8, 5), "norm": (7,)}


def expert(seed: int, *, without: str = "") -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        name: rng.normal(size=int(np.prod(shape))).astype(np.float32)
        for name, shape in SHAPES.items()
        if name != without
    }


def plainly(merged: torch.Tensor, added: torch.Tensor, share: float, *, two_sided: bool) -> torch.Tensor:
    """With the full bases: the core, its diagonal and its dominant part set to zero, and back."""
    left, values, right = torch.linalg.svd(merged.double(), full_matrices=True)
    rank = next(r for r in range(1, len(values) + 1) if values[:r].sum() >= share * values.sum())
    core = left.T @ added.double() @ right.T
    core.fill_diagonal_(0.0)
    if two_sided:
        core[:rank, :] = 0.0
        core[:, :rank] = 0.0
    else:
        core[:rank, :rank] = 0.0
    return left @ core @ right


@pytest.mark.parametrize("two_sided", [False, True])
@pytest.mark.parametrize("shape", [(6, 9), (8, 5), (4, 4)])
@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_the_projection(shape: tuple[int, int], share: float, two_sided: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    merged, added = (torch.randn(shape, generator=generator) for _ in range(2))
    found = projected(merged, added, share, two_sided=two_sided)
    torch.testing.assert_close(found.double(), plainly(merged, added, share, two_sided=two_sided), atol=1e-5, rtol=1e-4)
    assert abs(float((found * merged).sum())) < 1e-4


def test_the_sequence_and_its_norm() -> None:
    experts = [expert(seed) for seed in range(3)]
    merged = {name: np.zeros(int(np.prod(shape))) for name, shape in SHAPES.items()}
    factor, norms = 1.0, []
    for count, deltas in enumerate(experts):
        norms.append(math.sqrt(sum(float((v.astype(float) ** 2).sum()) for v in deltas.values())))
        total = {}
        for name, shape in SHAPES.items():
            added = deltas[name].astype(float)
            if len(shape) == 2 and count:
                pair = (torch.from_numpy(np.array(part, dtype=float)).view(shape) for part in (merged[name], added))
                added = plainly(*pair, 0.5, two_sided=False).numpy().reshape(-1)
            total[name] = factor * merged[name] + added
        size = math.sqrt(sum(float((v**2).sum()) for v in total.values()))
        factor = size / (sum(norms) / len(norms))
        merged = {name: values / factor for name, values in total.items()}
    found = opcm(iter(experts), SHAPES)
    for name in SHAPES:
        np.testing.assert_allclose(found[name], merged[name], atol=1e-3)  # decompositions in float32
    size = math.sqrt(sum(float((v.astype(float) ** 2).sum()) for v in found.values()))
    assert size == pytest.approx(sum(norms) / 3, rel=1e-5)


def test_one_expert_is_itself_and_gaps_are_zeros() -> None:
    alone = opcm([expert(1)], SHAPES)
    for name, values in expert(1).items():
        np.testing.assert_allclose(alone[name], values, rtol=1e-6)
    pair = opcm([expert(1, without="wide"), expert(2, without="tall")], SHAPES)
    assert pair.keys() == SHAPES.keys()
    assert np.isfinite(np.concatenate(list(pair.values()))).all()
    assert opcm([{}, {}], SHAPES) == {}


def test_two_experts_are_in_memory_at_most() -> None:
    """Each is asked for when the one before has been folded in."""
    alive: list[int] = []

    class Counted(dict[str, np.ndarray]):
        def __del__(self) -> None:
            alive.pop()

    def experts() -> Iterator[Deltas]:
        for seed in range(4):
            assert len(alive) <= 1
            alive.append(seed)
            yield Counted(expert(seed))

    opcm(experts(), SHAPES)
