"""A conversation stays with its experts unless its topic moves.

"And on Sundays?" says little by itself: only what was asked before tells who should answer. So the earlier questions
are routed too, and the experts that answer so far need fewer votes to stay than others need to take over. What this
gains and costs is in `bench/results/routing.json`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from router.decision import Decision, Reason

TURNS = 3
"""Earlier questions looked at: each costs a search, and its features if they are no longer known."""
TAKE_OVER = 0.7
"""Share of the votes with which another expert takes over; the experts so far stay while one vote is theirs."""


def last_turns(earlier: Sequence[str]) -> list[str]:
    """The last TURNS of the earlier questions that are not blank."""
    return [text for text in earlier if text.strip()][-TURNS:]


def in_conversation(decisions: Sequence[Decision]) -> Decision:
    """The decision for the last of several questions of one conversation, each decided by itself, oldest first."""
    held, *others = decisions
    for decision in others:
        held = decision if _moves(held, decision) else _kept(held, decision)
    return held


def _moves(held: Decision, decision: Decision) -> bool:
    if held.mix.is_base or held.mix == decision.mix:
        return True
    if not decision.mix.is_base and (decision.confidence or 0.0) >= TAKE_OVER:
        return True
    own = {digest for _, digest, _ in held.parts}
    return all(neighbour.digest not in own for neighbour in decision.neighbours)


def _kept(held: Decision, decision: Decision) -> Decision:
    names = " and ".join(repr(name) for name, _, _ in held.parts)
    return replace(
        decision,
        mix=held.mix,
        parts=held.parts,
        code=Reason.KEPT,
        reason=f"the conversation stays with {names}: what was asked now gives nobody else "
        f"{TAKE_OVER:.0%} of the votes",
    )
