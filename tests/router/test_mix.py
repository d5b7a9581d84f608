"""Neighbours become votes and votes weights."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.decision import NO_EXPERTS, Reason, Rules, decide
from router.index import BACKGROUND, Neighbour
from router.mix import MixMode, Votes, tally, voters, weigh
from router.options import RouteOptions
from store.mix import Mix


def near(
    name: str, distance: float = 0.5, *, reach: float = 1.0, digest: str | None = None, centres: int = 20
) -> Neighbour:
    return Neighbour(name, digest or name.upper(), distance, reach, centres, f"an exemplar of {name}")


def general(distance: float = 0.5) -> Neighbour:
    return Neighbour(BACKGROUND, BACKGROUND, distance, float("inf"), 60, "general text")


def rules(mode: MixMode = MixMode.TOP1, votes: Votes = Votes.COUNT, min_share: float = 0.2, steps: int = 5) -> Rules:
    return Rules(mode, votes, min_share, steps)


NEIGHBOURS = st.lists(st.builds(near, st.sampled_from("abcdef"), st.floats(0, 0.9)), min_size=1, max_size=20).map(
    lambda found: sorted(found, key=lambda n: n.distance)
)
STEPS = st.integers(1, 20)
SHARES = st.floats(0, 1)


@given(NEIGHBOURS, st.sampled_from(MixMode), SHARES, STEPS)
def test_weights_sum_to_one_in_whole_steps(found: list[Neighbour], mode: MixMode, share: float, steps: int) -> None:
    weights = weigh(tally(found, Votes.COUNT), mode=mode, min_share=share, steps=steps)
    assert sum(round(weight * steps) for weight in weights.values()) == steps
    assert all(weight > 0 and weight * steps == pytest.approx(round(weight * steps)) for weight in weights.values())
    assert set(weights) <= {n.digest for n in found}
    assert list(weights.values()) == sorted(weights.values(), reverse=True)


@given(NEIGHBOURS, SHARES, STEPS)
def test_top1_is_the_heaviest_of_the_soft_mix(found: list[Neighbour], share: float, steps: int) -> None:
    (best,) = weigh(tally(found, Votes.COUNT), mode=MixMode.TOP1, min_share=share, steps=steps)
    assert best == next(iter(weigh(tally(found, Votes.COUNT), mode=MixMode.SOFT, min_share=share, steps=steps)))
    votes = [n.digest for n in found]
    assert all(votes.count(best) >= votes.count(other) for other in votes)


@given(NEIGHBOURS, st.permutations("abcdef"), STEPS)
def test_names_do_not_matter(found: list[Neighbour], names: list[str], steps: int) -> None:
    renamed = dict(zip("abcdef", names, strict=True))
    other = [near(renamed[n.name], n.distance) for n in found]
    weights = weigh(tally(found, Votes.COUNT), mode=MixMode.SOFT, min_share=0.2, steps=steps)
    assert weigh(tally(other, Votes.COUNT), mode=MixMode.SOFT, min_share=0.2, steps=steps) == {
        renamed[digest.lower()].upper(): weight for digest, weight in weights.items()
    }


@given(NEIGHBOURS, SHARES, SHARES)
def test_a_higher_share_keeps_fewer_experts(found: list[Neighbour], one: float, other: float) -> None:
    def experts(share: float) -> set[str]:
        return set(weigh(tally(found, Votes.COUNT), mode=MixMode.SOFT, min_share=share, steps=1000))

    assert experts(max(one, other)) <= experts(min(one, other))


def test_votes_become_shares() -> None:
    found = [near("a")] * 6 + [near("b")] * 4
    assert weigh(tally(found, Votes.COUNT), mode=MixMode.SOFT, min_share=0.2, steps=10) == {"A": 0.6, "B": 0.4}
    assert weigh(tally(found, Votes.COUNT), mode=MixMode.SOFT, min_share=0.2, steps=2) == {"A": 0.5, "B": 0.5}


def test_a_stray_vote_vanishes() -> None:
    found = [near("a")] * 5 + [near("b")] * 4 + [near("c")]
    assert weigh(tally(found, Votes.COUNT), mode=MixMode.SOFT, min_share=0.2, steps=5) == {"A": 0.6, "B": 0.4}


def test_the_nearer_wins_a_draw() -> None:
    found = [near("b", 0.1), near("a", 0.2), near("a", 0.3), near("b", 0.4)]
    assert weigh(tally(found, Votes.COUNT), mode=MixMode.TOP1, min_share=0, steps=1) == {"B": 1.0}


def test_an_expert_of_few_centres_is_not_outvoted_from_afar() -> None:
    found = [near("few", 0.1)] * 3 + [near("many", 2.0)] * 7
    assert voters(found) == found[:3]


def test_nobody_votes_where_the_nearest_is_out_of_reach() -> None:
    assert voters([near("tight", 0.5, reach=0.4), near("wide", 0.6, reach=2.0)]) == []
    assert voters([]) == []


def test_a_match_explains_itself() -> None:
    found = tuple([near("cron", 0.5)] * 3 + [near("spam", 0.6)] + [near("poems", 2.0)])
    decision = decide(found, rules(MixMode.TOP1, min_share=0.2, steps=5))
    assert decision.mix == Mix.of({"CRON": 1.0})
    assert decision.parts == (("cron", "CRON", 1.0),)
    assert decision.code is Reason.MATCHED
    assert decision.votes == {"cron": 3, "spam": 1}
    assert (decision.distance, decision.threshold) == (0.5, 1.0)
    assert decision.neighbours == found
    assert "'cron'" in decision.reason
    assert "4 of 5" in decision.reason


def test_a_soft_match_names_every_expert() -> None:
    decision = decide(
        (near("a"), near("a"), near("a"), near("b"), near("b")), rules(MixMode.SOFT, min_share=0, steps=5)
    )
    assert decision.mix == Mix.of({"A": 0.6, "B": 0.4})
    assert decision.parts == (("a", "A", 0.6), ("b", "B", 0.4))
    assert "'a' (60%) and 'b' (40%)" in decision.reason


def test_two_names_of_one_expert_vote_for_it_together() -> None:
    found = (near("rival", 0.1), near("old", 0.2, digest="X"), near("new", 0.3, digest="X"))
    decision = decide(found, rules(MixMode.TOP1, min_share=0.2, steps=5))
    assert decision.parts == (("old", "X", 1.0),)
    assert decision.votes == {"rival": 1, "old": 1, "new": 1}


def test_far_from_everything_is_the_base() -> None:
    decision = decide((near("cron", 2.0), near("spam", 3.0)), rules(MixMode.TOP1, min_share=0.2, steps=5))
    assert decision.mix.is_base
    assert decision.parts == ()
    assert decision.code is Reason.OUT_OF_DOMAIN
    assert (decision.distance, decision.threshold) == (2.0, 1.0)
    assert decision.votes == {}
    assert "'cron'" in decision.reason


def test_no_neighbours_no_experts() -> None:
    assert decide((), rules(MixMode.TOP1, min_share=0.2, steps=5)) is NO_EXPERTS
    assert NO_EXPERTS.code == "no_experts"


VOTES = st.sampled_from(Votes)


@given(NEIGHBOURS, VOTES)
def test_tallies_are_in_order(found: list[Neighbour], votes: Votes) -> None:
    ranking = tally(found, votes)
    assert set(ranking) == {n.digest for n in found}
    assert list(ranking.values()) == sorted(ranking.values(), reverse=True)


def test_near_votes_weigh_more() -> None:
    found = [near("near", 0.1), near("far", 0.5), near("far", 0.5)]
    assert list(tally(found, Votes.COUNT)) == ["FAR", "NEAR"]
    assert tally(found, Votes.INVERSE) == {"NEAR": pytest.approx(10), "FAR": pytest.approx(4)}


def test_an_exemplar_met_exactly_has_a_finite_vote() -> None:
    assert tally([near("a", 0.0), near("b", 0.5)], Votes.INVERSE)["A"] == 100


def test_nobody_outvotes_an_expert_of_fewer_centres_by_number() -> None:
    found = [near("one", 0.3, centres=1), *[near("many", 0.4)] * 9]
    assert list(tally(found, Votes.COUNT)) == ["ONE", "MANY"]
    assert list(tally(found, Votes.INVERSE)) == ["ONE", "MANY"]


def test_the_background_may_win() -> None:
    found = (near("cron", 0.6), general(0.2), general(0.3))
    decision = decide(found, rules(votes=Votes.INVERSE))
    assert decision.mix.is_base
    assert decision.code is Reason.OUT_OF_DOMAIN
    assert (decision.distance, decision.threshold) == (0.6, 1.0)
    assert 0 < (decision.confidence or 0) < 0.5
    assert "general text" in decision.reason


def test_the_background_is_no_part_of_a_mix() -> None:
    found = (near("cron", 0.2), near("cron", 0.3), general(0.4))
    decision = decide(found, rules(MixMode.SOFT, Votes.INVERSE))
    assert decision.parts == (("cron", "CRON", 1.0),)
    assert decision.votes == {"cron": 2}
    assert 0.5 < (decision.confidence or 0) < 1


def test_nothing_but_background() -> None:
    decision = decide((general(0.1), general(0.2)), rules())
    assert decision.mix.is_base
    assert decision.code is Reason.OUT_OF_DOMAIN
    assert decision.confidence == 0


def test_a_request_may_ask_for_confidence() -> None:
    found = (near("a", 0.2), near("b", 0.25), near("a", 0.3))
    assert decide(found, rules(), RouteOptions(min_confidence=0.6)).code is Reason.MATCHED
    unsure = decide(found, rules(), RouteOptions(min_confidence=0.7))
    assert unsure.mix.is_base
    assert unsure.code is Reason.LOW_CONFIDENCE
    assert "67%" in unsure.reason
    assert "70%" in unsure.reason


def test_a_request_may_bound_its_mix() -> None:
    found = tuple([near("a")] * 4 + [near("b")] * 3 + [near("c")] * 3)
    soft = rules(MixMode.SOFT)
    assert len(decide(found, soft).parts) == 3
    assert decide(found, soft, RouteOptions(max_experts=2)).parts == (("a", "A", 0.6), ("b", "B", 0.4))
    assert decide(found, soft, RouteOptions(mode=MixMode.TOP1)).parts == (("a", "A", 1.0),)
    assert len(decide(found, rules(), RouteOptions(mode=MixMode.SOFT)).parts) == 3
