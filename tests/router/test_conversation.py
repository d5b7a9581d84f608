"""Whom a conversation stays with."""

from __future__ import annotations

from router.conversation import TURNS, in_conversation, last_turns
from router.decision import Decision, Reason, Rules, decide
from router.index import Neighbour
from router.mix import MixMode, Votes

RULES = Rules(MixMode.TOP1, Votes.COUNT, 0.2, 5)


def decision(**votes: int) -> Decision:
    """Decided by ten centres, so many of each expert and the rest of the background."""
    own = [name for name, count in votes.items() for _ in range(count)]
    names = own + [""] * (10 - len(own))
    return decide(tuple(Neighbour(n, n and f"digest-{n}", 0.5, 1.0, 20, "") for n in names), RULES)


def test_the_first_question_decides_alone() -> None:
    assert in_conversation([decision(cron=9)]) == decision(cron=9)


def test_a_vague_question_stays_with_the_expert() -> None:
    kept = in_conversation([decision(cron=9), decision(cron=2)])
    assert kept.code is Reason.KEPT
    assert [name for name, _, _ in kept.parts] == ["cron"]
    assert kept.mix == decision(cron=9).mix
    assert "cron" in kept.reason


def test_a_few_votes_more_are_not_enough_to_take_over() -> None:
    assert in_conversation([decision(cron=9), decision(french=6, cron=4)]).parts[0][0] == "cron"


def test_a_clear_question_moves_the_conversation() -> None:
    assert in_conversation([decision(cron=9), decision(french=8, cron=1)]) == decision(french=8, cron=1)


def test_a_question_without_any_likeness_goes_to_the_base() -> None:
    assert in_conversation([decision(cron=9), decision()]).mix.is_base
    assert in_conversation([decision(cron=9), decision(french=3)]).code is Reason.OUT_OF_DOMAIN


def test_the_base_holds_nothing() -> None:
    assert in_conversation([decision(), decision(cron=6)]) == decision(cron=6)


def test_what_was_kept_is_kept_on() -> None:
    kept = in_conversation([decision(cron=9), decision(cron=1), decision(cron=1)])
    assert [name for name, _, _ in kept.parts] == ["cron"]
    back = in_conversation([decision(cron=9), decision(cron=1), decision(), decision(cron=1)])
    assert back.mix.is_base


def test_only_the_last_turns_count() -> None:
    asked = [f"question {i}" for i in range(10)]
    assert last_turns([*asked, " ", ""]) == asked[-TURNS:]
