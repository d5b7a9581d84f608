"""Which tokens a sequence has seen, and how often it has said them: what penalties look at."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


class TokenCounts:
    """Distinct tokens of a prompt and its answer, kept up to date as the answer grows.

    Args:
        prompt: tokens that count as seen, but not as said.
    """

    def __init__(self, prompt: Sequence[int]) -> None:
        distinct = dict.fromkeys(prompt)
        self._place = {token: place for place, token in enumerate(distinct)}
        self._tokens = np.fromiter(distinct, np.int64, len(distinct))
        self._counts = np.zeros(len(distinct), dtype=np.float32)
        self._read = len(prompt)

    @property
    def tokens(self) -> npt.NDArray[np.int64]:
        """The distinct tokens."""
        return self._tokens[: len(self._place)]

    @property
    def counts(self) -> npt.NDArray[np.float32]:
        """How often the answer holds each of them."""
        return self._counts[: len(self._place)]

    def catch_up(self, tokens: Sequence[int]) -> None:
        """Count what has been added to the prompt and answer since the last call."""
        for token in tokens[self._read :]:
            place = self._place.setdefault(token, len(self._place))
            if place == len(self._tokens):
                self._tokens = np.append(self._tokens, np.zeros(max(16, place), np.int64))
                self._counts = np.append(self._counts, np.zeros(max(16, place), np.float32))
            self._tokens[place] = token
            self._counts[place] += 1
        self._read = len(tokens)
