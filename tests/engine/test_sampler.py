"""Sampling for many rows at once against its meaning for one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine import draw as drawing
from server.engine.draw import uniforms
from server.engine.likelihood import likelihoods
from server.engine.sampler import sample as sample_all
from server.engine.sampling_reference import distribution, edited
from server.engine.sequence import Sequence
from server.engine.token_counts import TokenCounts
from server.engine.types import EngineRequest, SamplingParams

EOS = frozenset({0})
few = settings(max_examples=60, deadline=None)


def sequence(sampling: SamplingParams, prompt: list[int], answer: list[int]) -> Sequence:
    made = Sequence(EngineRequest(tuple(prompt), sampling), 1000, emit=lambda event: None, eos=EOS)
    made.tokens += answer
    return made


def sample(logits: torch.Tensor, sequences: list[Sequence]) -> list[int | None]:
    return [None if choice is None else choice.token for choice in sample_all(logits, sequences)]


@st.composite
def batches(draw: st.DrawFn) -> tuple[torch.Tensor, list[tuple[SamplingParams, list[int], list[int]]]]:
    """Logits with ties and gaps, and requests of every kind."""
    vocabulary = draw(st.integers(3, 40))
    token = st.integers(0, vocabulary - 1)
    bias = st.dictionaries(token, st.sampled_from([-100.0, -1.5, 2.0, 100.0]), max_size=4)
    sampling = st.builds(
        SamplingParams,
        temperature=st.sampled_from([0.0, 1e-6, 0.3, 1.0, 2.0]),
        top_k=st.sampled_from([0, 1, 2, 5, 1000]),
        top_p=st.sampled_from([1e-6, 0.1, 0.5, 0.9, 1.0]),
        min_p=st.sampled_from([0.0, 0.01, 0.3, 1.0]),
        repetition_penalty=st.sampled_from([1.0, 1.3, 0.7]),
        presence_penalty=st.sampled_from([0.0, 0.5, -2.0]),
        frequency_penalty=st.sampled_from([0.0, 0.25, -1.0]),
        logit_bias=bias.map(lambda items: tuple(items.items())),
        seed=st.integers(-(2**63), 2**63 - 1),
        min_tokens=st.sampled_from([0, 3]),
        stop_tokens=st.frozensets(token, max_size=1),
        ignore_eos=st.booleans(),
    )
    text = st.lists(token, max_size=6)
    rows = draw(st.lists(st.tuples(sampling, text.filter(bool), text), min_size=1, max_size=6))
    value = st.sampled_from([-7.0, -2.0, -0.5, 0.0, 0.25, 1.0, 3.0, 9.0]) | st.floats(-20, 20, width=32)
    logits = draw(st.lists(value, min_size=vocabulary * len(rows), max_size=vocabulary * len(rows)))
    return torch.tensor(logits).view(len(rows), vocabulary), rows


@few
@given(batches())
def test_every_row_follows_its_own_rules(batch: tuple[torch.Tensor, list[Any]]) -> None:
    """The token is the one at which the row's cumulative distribution passes its random number."""
    logits, rows = batch
    before = logits.clone()
    chosen = sample(logits, [sequence(*row) for row in rows])
    assert torch.equal(logits, before)
    for row, token, (sampling, prompt, answer) in zip(logits, chosen, rows, strict=True):
        assert token is not None
        ends = sequence(sampling, prompt, answer).stop_tokens
        expected = distribution(edited(row.double().numpy(), sampling, prompt, answer, ends), sampling)
        if sampling.greedy:
            changed = edited(row.double().numpy(), sampling, prompt, answer, ends)
            assert changed[token] >= changed.max() - 1e-5
            continue
        if not expected[token]:  # a tie in float64 that float32 tells apart, or the other way round
            assert _nearly_stays(row.double().numpy(), token, sampling, prompt, answer, ends)
            continue
        if _ambiguous(row.double().numpy(), sampling, prompt, answer, ends):
            continue
        number = uniforms(np.array([sampling.seed % 2**64], np.uint64), np.array([len(answer)], np.uint64))[0]
        assert expected[:token].sum() - 1e-5 <= number <= expected[: token + 1].sum() + 1e-5


def _moved_borders(sampling: SamplingParams, by: float) -> SamplingParams:
    return replace(
        sampling, top_p=min(1.0, sampling.top_p * (1 + by)), min_p=min(1.0, max(0.0, sampling.min_p * (1 - by)))
    )


def _stays(logits: Any, sampling: SamplingParams, *rest: Any) -> Any:
    return distribution(edited(logits, sampling, *rest), sampling) > 0


def _ambiguous(logits: Any, sampling: SamplingParams, *rest: Any) -> bool:
    """Whether rounding decides which tokens stay."""
    wobbled = np.round(logits + 1e-6 * np.sin(np.arange(len(logits))), 12)
    kinds = [_stays(given, _moved_borders(sampling, by), *rest) for given in (logits, wobbled) for by in (-1e-5, 1e-5)]
    return any((kind != kinds[0]).any() for kind in kinds)


def _nearly_stays(logits: Any, token: int, sampling: SamplingParams, *rest: Any) -> bool:
    changed = edited(logits, sampling, *rest)
    kept = distribution(changed, _moved_borders(sampling, 1e-4)) > 0
    return bool(changed[token] >= changed[kept].min() - 1e-4)


@few
@given(batches())
def test_a_row_does_not_depend_on_its_batch(batch: tuple[torch.Tensor, list[Any]]) -> None:
    logits, rows = batch
    together = sample(logits, [sequence(*row) for row in rows])
    alone = [sample(logits[i : i + 1], [sequence(*row)])[0] for i, row in enumerate(rows)]
    assert together == alone


@pytest.mark.parametrize("spread", [0.0, 0.01, 1.0, 5.0])
def test_a_nucleus_wider_than_the_first_candidates(spread: float) -> None:
    """Flat rows need more candidates than peaked ones; either must keep exactly the nucleus."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5000, generator=generator) * torch.tensor([[spread], [0.3], [8.0]])
    scaled = logits - logits.amax(dim=-1, keepdim=True)
    ones = np.ones(3, np.float32)
    rules = drawing.Rules(ones, np.zeros(3, np.int64), ones * np.float32(0.9), ones * 0, ones * 0)
    floor = drawing.thresholds(scaled.exp(), rules)
    assert floor is not None
    for row, lowest in zip(scaled.double().numpy(), floor.tolist(), strict=True):
        kept = distribution(row, SamplingParams(top_p=0.9)) > 0
        assert abs(int((np.exp(row) >= lowest).sum()) - int(kept.sum())) <= 1


def test_draws_follow_the_distribution() -> None:
    """20,000 draws of one stream, and of 20,000 streams: frequencies within five standard deviations."""
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 3.0])
    sampling = SamplingParams(temperature=1.5, top_k=4)
    expected = distribution(logits.double().numpy(), sampling)
    draws = 20_000
    one = [sequence(replace(sampling, seed=5), [1], [2] * at) for at in range(50)]
    for sequences in (one, [sequence(replace(sampling, seed=i), [1], []) for i in range(draws)]):
        if sequences is one:
            seeds, counters = np.full(draws, 5, np.uint64), np.arange(draws, dtype=np.uint64)
            numbers = uniforms(seeds, counters)
            chosen = np.searchsorted(expected.cumsum(), numbers, side="right").tolist()
            assert chosen[:50] == sample(logits.expand(50, -1), one)
        else:
            chosen = sample(logits.expand(draws, -1), sequences)
        counts = np.bincount(chosen, minlength=5)
        deviation = np.sqrt(draws * expected * (1 - expected)) + 1e-9
        assert (np.abs(counts - draws * expected) <= 5 * deviation).all()


def test_random_numbers_stay_below_one_and_streams_differ() -> None:
    seeds = np.repeat(np.arange(300, dtype=np.uint64), 300)
    numbers = uniforms(seeds, np.tile(np.arange(300, dtype=np.uint64), 300))
    assert numbers.dtype == np.float32
    assert 0.0 <= numbers.min() < 0.001
    assert 0.999 < numbers.max() < 1.0
    grid = numbers.reshape(300, 300)
    # Neither along a stream nor across neighbouring seeds is there a pattern.
    assert np.abs(np.corrcoef(grid)[~np.eye(300, dtype=bool)]).max() < 0.35
    assert np.abs(np.corrcoef(grid.T)[~np.eye(300, dtype=bool)]).max() < 0.35


def test_the_last_token_is_reached_and_none_behind_it() -> None:
    """With the largest random number, rounding must not choose a token without mass."""
    logits = torch.full((1, 1000), -torch.inf)
    logits[0, :7] = 0.3
    one = np.ones(1, np.float32)
    rules = drawing.Rules(one, np.zeros(1, np.int64), one, one * 0, one * np.float32(1 - 2**-24))
    assert drawing.draw(logits, rules).item() == 6


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), None])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_poisoned_row_says_so_and_spares_the_others(poison: float | None, temperature: float) -> None:
    logits = torch.randn(3, 20, generator=torch.Generator().manual_seed(1))
    sampling = SamplingParams(temperature=temperature, seed=3, logit_bias=((4, 5.0),), presence_penalty=1.0)
    rows = [sequence(sampling, [1], [4]) for _ in range(3)]
    clean = sample(logits, rows)
    if poison is None:
        logits[1] = -torch.inf
    else:
        logits[1, 7] = poison
    assert sample(logits, rows) == [clean[0], None, clean[2]]


@few
@given(st.lists(st.integers(0, 9)), st.lists(st.lists(st.integers(0, 50), max_size=30), max_size=5))
def test_tokens_are_counted_as_they_come(prompt: list[int], pieces: list[list[int]]) -> None:
    counts, tokens = TokenCounts(prompt), list(prompt)
    for piece in pieces:
        tokens += piece
        counts.catch_up(tokens)
    answer = tokens[len(prompt) :]
    said = dict(zip(counts.tokens.tolist(), counts.counts.tolist(), strict=True))
    assert said == {token: answer.count(token) for token in set(tokens)}


@few
@given(st.integers(1, 150), st.integers(2, 30), st.randoms(use_true_random=False))
def test_likelihoods_are_log_softmax(rows: int, vocabulary: int, random: Any) -> None:
    logits = torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(random.randrange(1000))) * 5
    tokens = [random.randrange(vocabulary) for _ in range(rows)]
    best = [random.choice([0, 1, 3, 40]) for _ in range(rows)]
    expected = logits.double().log_softmax(dim=-1)
    for row, found in enumerate(likelihoods(logits, tokens, best)):
        assert found.token == tokens[row]
        assert found.logprob == pytest.approx(expected[row, tokens[row]].item(), abs=1e-4)
        assert [value for _, value in found.best] == pytest.approx(
            expected[row].sort(descending=True).values[: best[row]].tolist(), abs=1e-4
        )
        assert [expected[row, token].item() for token, _ in found.best] == pytest.approx(
            [value for _, value in found.best], abs=1e-4
        )


def test_likelihoods_are_told_to_those_who_ask_and_are_the_model_s_own() -> None:
    """Whatever the request changes in the logits."""
    logits = torch.randn(3, 20, generator=torch.Generator().manual_seed(1))
    asks = SamplingParams(temperature=0.1, seed=1, logit_bias=((4, 100.0),), presence_penalty=1.0, logprobs=2)
    rows = [sequence(s, [1], [4]) for s in (SamplingParams(), asks, replace(asks, temperature=0.0, logprobs=0))]
    silent, full, short = sample_all(logits, rows)
    assert silent is not None and full is not None and short is not None  # noqa: PT018
    assert silent.likelihood is None
    assert full.likelihood == likelihoods(logits[1:2], [4], [2])[0]
    assert short.likelihood == likelihoods(logits[2:3], [4], [0])[0]
