"""The rows of one step: whose tokens they are, where their keys and values go, and which mix they speak with."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass

from server.engine.attention import Segment
from server.engine.scheduler import Work
from server.engine.sequence import Sequence
from store.mix import Mix


@dataclass(frozen=True)
class Span:
    """Rows `start:stop` belong to sequences of `mix`."""

    mix: Mix
    start: int
    stop: int


@dataclass(frozen=True)
class Layout:
    """All rows of a step, sequence after sequence.

    Attributes:
        tokens: their ids.
        segments: the sequences' shares.
        logit_rows: rows whose next-token logits are wanted: those to sample from, then those that score prompts.
        scored: sequences with the tokens of their prompts that the latter score.
        spans: the rows by mix; together they cover all rows.
        logit_spans: the same for `logit_rows`, counted from zero; a mix may have several.
    """

    tokens: list[int]
    segments: list[Segment]
    logit_rows: list[int]
    scored: list[tuple[Sequence, range]]
    spans: tuple[Span, ...]
    logit_spans: tuple[Span, ...]


def lay_out(work: Items[Work]) -> Layout:
    """Rows in the order of `work`, whose pieces of one mix must be neighbours."""
    tokens: list[int] = []
    segments: list[Segment] = []
    sampled_rows: list[int] = []
    scored_rows: list[int] = []
    scored: list[tuple[Sequence, range]] = []
    mixes: list[Mix] = []
    for item in work:
        sequence, start = item.sequence, len(tokens)
        tokens += sequence.tokens[sequence.computed : sequence.computed + item.count]
        segments.append(Segment(start, len(tokens), sequence.computed, tuple(sequence.blocks)))
        mixes += [sequence.mix] * item.count
        if item.samples:
            sampled_rows.append(len(tokens) - 1)
        if places := sequence.to_score(item.count):
            scored.append((sequence, places))
            scored_rows += [start + token - 1 - sequence.computed for token in places]
    logit_rows = sampled_rows + scored_rows
    return Layout(tokens, segments, logit_rows, scored, _spans(mixes), _spans([mixes[row] for row in logit_rows]))


def _spans(mixes: Items[Mix]) -> tuple[Span, ...]:
    spans: list[Span] = []
    for row, mix in enumerate(mixes):
        if spans and (spans[-1].mix is mix or spans[-1].mix == mix):
            spans[-1] = Span(mix, spans[-1].start, row + 1)
        else:
            spans.append(Span(mix, row, row + 1))
    return tuple(spans)
