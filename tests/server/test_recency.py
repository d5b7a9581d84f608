"""When experts were last used: bounded, the idlest forgotten first."""

from __future__ import annotations

from server.recency import Recency


def test_the_idlest_are_forgotten_first() -> None:
    now = iter((10.7, 20.0, 30.0, 40.0))
    recency = Recency(lambda: next(now), most=2)
    for digest in ("a", "b", "a"):
        recency.note(digest)
    assert (recency.last("a"), recency.last("b"), recency.last("c")) == (30, 20, None)
    recency.note("c")
    assert (recency.last("a"), recency.last("b"), recency.last("c")) == (30, None, 40)
