"""What sampling means, for one row at a time and in float64: what `sampler` must agree with."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from server.engine.types import SamplingParams

Row = npt.NDArray[np.float64]


def edited(logits: Row, sampling: SamplingParams, prompt: list[int], answer: list[int], ends: frozenset[int]) -> Row:
    """The logits after penalties, biases and bans.

    Args:
        ends: tokens that end the answer.
    """
    logits = logits.copy()
    for token in set(prompt + answer):
        penalty, said = sampling.repetition_penalty, answer.count(token)
        logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
        logits[token] -= sampling.frequency_penalty * said + sampling.presence_penalty * (said > 0)
    for token, bias in sampling.logit_bias:
        logits[token] += bias
    if len(answer) < sampling.min_tokens:
        logits[list(ends)] = -np.inf
    return logits


def distribution(logits: Row, sampling: SamplingParams) -> Row:
    """The probability with which each token is chosen."""
    if sampling.greedy:
        return np.bincount([logits.argmax()], minlength=len(logits)).astype(np.float64)
    p = np.exp((logits - logits.max()) / sampling.temperature)
    p[p < sampling.min_p] = 0.0  # of the likeliest, whose p is 1
    if 0 < sampling.top_k < len(p):
        p[p < np.sort(p)[-sampling.top_k]] = 0.0
    if sampling.top_p < 1.0:
        likelier = np.array([p[p > own].sum() for own in p])
        p[likelier >= sampling.top_p * p.sum()] = 0.0
    normalised: Row = p / p.sum()
    return normalised
