"""Blocks are handed out once, shared by key, and kept until their room is needed."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from server.engine.block_pool import BlockPool


def test_what_was_used_least_recently_goes_first_and_the_end_of_a_prompt_before_its_beginning() -> None:
    pool = BlockPool(range(4))
    one, two = pool.take(2), pool.take(2)
    assert one is not None
    assert two is not None
    for blocks, name in ((one, b"one"), (two, b"two")):
        for place, block in enumerate(blocks):
            pool.publish(block, name + bytes([place]))
        pool.give_back(blocks)
    assert (pool.free, pool.kept) == (4, 4)
    assert pool.take(1) == one[1:]
    assert pool.share([b"one\0", b"one\1"]) == one[:1]
    assert pool.take(1) == two[1:]
    assert pool.share([b"two\1"]) == []
    assert pool.take(2) is None
    assert pool.take(1) == two[:1]


def test_equal_blocks_are_found_once_and_withdrawn_ones_never() -> None:
    pool = BlockPool(range(3))
    blocks = pool.take(3)
    assert blocks is not None
    pool.publish(blocks[0], b"a")
    pool.publish(blocks[1], b"a")
    assert pool.share([b"a"]) == blocks[:1]
    pool.withdraw(blocks[:1])
    assert pool.share([b"a"]) == []
    pool.give_back(blocks[:1])
    assert pool.free == 0, "one user is left"
    pool.give_back(blocks)
    assert (pool.free, pool.kept) == (3, 0)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 7), st.integers(0, 5)), max_size=80))
def test_random_use_agrees_with_a_count_by_hand(steps: list[tuple[int, int, int]]) -> None:
    pool, size = BlockPool(range(8)), 8
    held: list[list[int]] = []
    contents: dict[int, bytes] = {}
    for what, place, number in steps:
        if what == 0 and (taken := pool.take(number)) is not None:
            assert not {block for blocks in held for block in blocks} & set(taken)
            held.append(taken)
            for block in taken:
                contents.pop(block, None)
        elif what == 1:
            shared = pool.share([bytes([number]), bytes([number + 1])])
            assert [contents[block] for block in shared] == [bytes([number + i]) for i in range(len(shared))]
            held.append(shared)
        elif what == 2 and held and held[place % len(held)]:
            block = held[place % len(held)][0]
            pool.publish(block, bytes([number]))
            if block not in contents and bytes([number]) not in contents.values():
                contents[block] = bytes([number])
        elif what == 3 and held:
            pool.give_back(held.pop(place % len(held)))
        elif what == 4 and held:
            pool.withdraw(held[place % len(held)])
            for block in held[place % len(held)]:
                contents.pop(block, None)
        used = {block for blocks in held for block in blocks}
        assert pool.free == size - len(used)
        assert pool.kept == len(contents.keys() - used)
