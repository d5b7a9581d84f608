"""Traces in turns over all servers, and what comes of it: rows of servers, ratios of ours to theirs, bars."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

import httpx
import numpy as np

from bench.peers.replay import Peer, Replay, WrongAnswerError, decode_speed, replay
from bench.peers.servers import CLIENTS, resident_bytes
from bench.peers.trace import Asked, mixed, natural, one_each
from bench.report import Bar, Row, bar
from examples.tasks import TASKS
from examples.tasks import Row as Example

OURS, OURS_INT4, LLAMA = "switchyard, bfloat16", "switchyard, int4", "llama.cpp"
STORY = "Tell me a long story about a small town by the sea."


@dataclass(frozen=True)
class Effort:
    """How much of everything."""

    requests: int
    rounds: int
    natural: int
    """Answers of each expert that are compared with the right one."""
    tokens: int
    """Of each of the eight streams, and of the single one."""
    short_rounds: int
    """Of the streams against llama.cpp."""


FULL = Effort(requests=64, rounds=3, natural=4, tokens=64, short_rounds=7)
QUICK = Effort(requests=8, rounds=1, natural=1, tokens=8, short_rounds=1)
Speeds = dict[str, list[float]]
"""Server → tokens per second, round by round."""


def ours_against(name: str) -> str:
    """Which of our servers a peer is compared with: the one whose base has as many bits."""
    return OURS_INT4 if name.startswith(LLAMA) else OURS


async def measure(
    peers: Sequence[Peer], tests: Mapping[str, Sequence[Example]], effort: Effort
) -> tuple[list[Row], list[Bar]]:
    """Everything that is measured of servers that run. A peer that fails on the way is left out, and the rows say why.

    Args:
        tests: held-out rows of every expert.
    """
    scores: dict[str, float] = {}
    failed: list[Row] = []
    for peer in peers:
        try:
            scores[peer.name] = await _scored(peer, tests, effort.natural)
        except httpx.HTTPError as problem:
            failed.append({"server": peer.name, "skipped": f"{type(problem).__name__}: {problem}"})
            print(f"{peer.name}: does not answer", file=sys.stderr)
        else:
            print(f"{peer.name}: {scores[peer.name]:.2f} of the answers are right", file=sys.stderr)
    peers = [peer for peer in peers if peer.name in scores]
    replays: dict[str, list[Replay]] = {peer.name: [] for peer in peers}
    for turn in range(effort.rounds):
        trace = mixed(tests, effort.requests, seed=turn)
        for peer in _rotated(peers, turn):
            try:
                replays[peer.name].append(await replay(peer, trace, CLIENTS))
            except (httpx.HTTPError, WrongAnswerError) as problem:
                if peer.name in (OURS, OURS_INT4):
                    raise
                failed.append({"server": peer.name, "skipped": f"in round {turn}: {problem}"})
                print(f"round {turn}: {peer.name} failed, and is left out", file=sys.stderr)
                peers = [other for other in peers if other is not peer]
            else:
                print(f"round {turn}: {peer.name}, {replays[peer.name][-1].seconds:.1f} s", file=sys.stderr)
    replays = {peer.name: replays[peer.name] for peer in peers}
    rows: list[Row] = [_row(peer, replays[peer.name], scores[peer.name]) for peer in peers] + failed
    speeds = {name: [one.tokens_per_second for one in some] for name, some in replays.items()}
    theirs = [name for name in speeds if name not in (OURS, OURS_INT4)]
    found = [_compared("mixed trace", name, speeds) for name in theirs]
    bars = [bar(f"peers.mixed.{name}", f"mixed trace, × {name}", ratio, ">=", 1.0) for name, ratio, _ in found]
    rows += [row for _, _, row in found]
    four_bits = [peer for peer in peers if peer.name.startswith((OURS_INT4, LLAMA))]
    if len(four_bits) == 2:
        more, further = await _streams(four_bits, tests, effort)
        rows, bars = [*rows, *more], [*bars, *further]
    return rows, bars


async def _streams(
    peers: Sequence[Peer], tests: Mapping[str, Sequence[Example]], effort: Effort
) -> tuple[list[Row], list[Bar]]:
    """One stream of the base, and a stream of every expert, four bits against four bits."""
    story = Asked(None, STORY, effort.tokens)

    async def one(peer: Peer, _: int) -> float:
        return await decode_speed(peer, story)

    async def each(peer: Peer, turn: int) -> float:
        return (await replay(peer, one_each(tests, effort.tokens, turn), len(tests))).tokens_per_second

    rows: list[Row] = []
    bars: list[Bar] = []
    works = {"one stream of the base, decoding": (one, 0.8), f"{len(tests)} streams on as many experts": (each, 1.5)}
    for what, (work, goal) in works.items():
        speeds = await _in_turns(peers, work, effort.short_rounds)
        name, ratio, row = _compared(what, next(name for name in speeds if name != OURS_INT4), speeds)
        rows.append(row)
        bars.append(bar(f"peers.{work.__name__}", f"{what}, × {name}", ratio, ">=", goal))
    return rows, bars


async def _in_turns(peers: Sequence[Peer], work: Callable[[Peer, int], Awaitable[float]], rounds: int) -> Speeds:
    speeds: Speeds = {peer.name: [] for peer in peers}
    for turn in range(rounds + 1):  # the first is to warm up
        for peer in _rotated(peers, turn):
            speed = await work(peer, turn)
            if turn:
                speeds[peer.name].append(speed)
    return speeds


async def _scored(peer: Peer, tests: Mapping[str, Sequence[Example]], count: int) -> float:
    """Share of right answers where the model ends them itself; also brings all experts to where they are computed."""
    await replay(peer, [Asked(name, rows[0]["prompt"], 2) for name, rows in tests.items()], 1)
    asked = natural(tests, count)
    said = (await replay(peer, asked, CLIENTS)).answers
    right = [TASKS[one.expert or ""].score(got.text, one.gold) for one, got in zip(asked, said, strict=True)]
    return sum(right) / len(right)


def _row(peer: Peer, replays: Sequence[Replay], score: float) -> Row:
    seconds = [answer.seconds for one in replays for answer in one.answers]
    return {
        "server": peer.name,
        "tok/s": statistics.median(one.tokens_per_second for one in replays),
        "requests/min": 60 * statistics.median(len(one.answers) / one.seconds for one in replays),
        "answer after, s, p50": float(np.quantile(seconds, 0.5)),
        "p95": float(np.quantile(seconds, 0.95)),
        "memory MB": resident_bytes(peer.pid) / 1e6,
        "prompt tokens": sum(answer.prompt_tokens for answer in replays[0].answers),
        "right answers": score,
    }


def _compared(what: str, against: str, speeds: Speeds) -> tuple[str, float, Row]:
    """The peer, the median ratio of ours to its speed, and the row."""
    mine = ours_against(against)
    ratios = [ours / theirs for ours, theirs in zip(speeds[mine], speeds[against], strict=True)]
    ratio = statistics.median(ratios)
    row = {
        "what": what, "ours": mine, "tok/s": statistics.median(speeds[mine]), "against": against,
        "its tok/s": statistics.median(speeds[against]), "ratio": ratio, "least": min(ratios), "most": max(ratios),
    }  # fmt: skip
    return against, ratio, row


def _rotated(peers: Sequence[Peer], turn: int) -> list[Peer]:
    """Everyone goes first in turns."""
    start = turn % len(peers)
    return [*peers[start:], *peers[:start]]
