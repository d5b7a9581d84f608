"""What a soak compares with: which expert a name may have meant, and what the offline-merged model says."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from server.engine.spelling import Spelling
from store.mix import Mix
from tests.engine.conftest import Library
from tests.tiny import save_base, tokenizer

MARGIN = 1e-3
"""Logits that are closer than this are a tie: float32 sums in another order may choose either."""

_KEPT_SPANS = 100
_END = b"<|end|>"

THEMES = ("rivers {}", "add 4{} and 17", "a recipe with {} eggs", "cron every {} minutes", "flat {} to let", "verse {}")


@dataclass
class _Span:
    """While a name pointed to a digest; None while there was nothing of that name."""

    digest: str | None
    since: float
    until: float = float("inf")


class Names:
    """What every name has pointed to and when, as far as a client can know. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._spans: dict[str, list[_Span]] = {}

    @contextmanager
    def change(self, name: str, digest: str | None) -> Iterator[None]:
        """A change that is under way: until it is answered the name may mean either."""
        with self._lock:
            spans = self._spans.setdefault(name, [_Span(None, 0.0)])
            spans.append(_Span(digest, time.monotonic()))
        yield
        with self._lock:
            spans[-2].until = time.monotonic()
            del spans[:-_KEPT_SPANS]

    def current(self, name: str) -> str | None:
        """What a name points to now."""
        with self._lock:
            return self._spans[name][-1].digest if name in self._spans else None

    def possible(self, name: str, since: float, until: float) -> set[str | None]:
        """All that a name may have meant to a request between two times."""
        with self._lock:
            spans = self._spans.get(name, [_Span(None, 0.0)])
            return {span.digest for span in spans if span.since <= until and span.until >= since}


@dataclass(frozen=True)
class Verdict:
    """What came of a comparison: `right`, `tie` (the model is undecided where the answers part) or `wrong`."""

    word: str
    expected: str = ""


class Oracle:
    """A tiny base, expert files of it, and their merged models: what the server must say, computed another way.

    Args:
        folder: where base and files are made.
        experts: how many files.
    """

    def __init__(self, folder: Path, experts: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.library = Library(save_base(folder / "base"), folder)
        self.digests = [self.library.add(seed) for seed in range(1, experts + 1)]
        self.tokenizer: PreTrainedTokenizerFast = tokenizer()
        self._spelling = Spelling(self.tokenizer)
        self._known: dict[tuple[Mix, tuple[int, ...], int], list[int]] = {}

    def encode(self, prompt: str, *, chat: bool) -> tuple[int, ...]:
        """The tokens that the server sees."""
        if chat:
            turns = [{"role": "user", "content": prompt}]
            prompt = str(self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
        return tuple(self.tokenizer(prompt, add_special_tokens=False).input_ids)

    def greedy(self, mix: Mix, prompt: tuple[int, ...], max_tokens: int) -> list[int]:
        """The merged model's own answer; asked once for the same thing."""
        key = (mix, prompt, max_tokens)
        if key not in self._known:
            self._known[key] = self.library.greedy(mix, list(prompt), max_tokens)
        return self._known[key]

    def judge(
        self, mix: Mix, prompt: tuple[int, ...], max_tokens: int, text: str, pieces: Sequence[bytes] | None
    ) -> Verdict:
        """Compare an answer.

        Args:
            text: the whole answer.
            pieces: the bytes of its tokens, where the request asked for them.
        """
        expected = self.greedy(mix, prompt, max_tokens)
        said = self._text(expected)
        spelled = [self._spelling.bytes_of(token) for token in expected]
        # The token that ends an answer has no text, but a likelihood.
        if said == text and (pieces is None or list(pieces) in (spelled, [*spelled, _END])):
            return Verdict("right")
        return Verdict("tie" if self._is_tie(mix, prompt, expected, text) else "wrong", said)

    def _is_tie(self, mix: Mix, prompt: tuple[int, ...], expected: Sequence[int], text: str) -> bool:
        """Whether the model hardly prefers its own answer at the place where the other one parts from it."""
        same = 0
        while same < len(expected) and text.startswith(self._settled(expected[: same + 1])):
            same += 1
        model = self.library.merged(mix)
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *expected]])).logits[0]
        # A character that is torn hides up to three tokens.
        for place in range(max(0, same - 3), min(same + 1, len(expected) + 1)):
            best = logits[len(prompt) - 1 + place].topk(2).values
            if float(best[0] - best[1]) < MARGIN:
                return True
        return False

    def _settled(self, tokens: Sequence[int]) -> str:
        return self._text(tokens).rstrip("\ufffd")

    def _text(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def prompts(seed: int) -> list[tuple[int, str]]:
    """Prompts with the theme they belong to; few enough that the oracle need not answer for ever."""
    dice = random.Random(seed)
    return [(i, theme.format(dice.randrange(100))) for i, theme in enumerate(THEMES) for _ in range(4)]


def exemplars(theme: int) -> str:
    """JSON lines of prompts by which an expert of this theme is found."""
    return "\n".join(f'{{"prompt": "{THEMES[theme % len(THEMES)].format(i)}"}}' for i in range(12))


def mix_of(parts: Sequence[Mapping[str, object]]) -> Mix:
    """The mix that an answer says it came from."""
    weights: dict[str, float] = {}
    for part in parts:
        weights[str(part["digest"])] = weights.get(str(part["digest"]), 0.0) + float(str(part["weight"]))
    return Mix.of(weights)
