"""Blocks: nothing leaks, nothing is shared that is not the same."""

from __future__ import annotations

import random

from weft.serve.schedule.blocks import Blocks


def filled(blocks: Blocks, tokens: list[int], salt: str = "") -> list[int]:
    """The blocks of a text, found or taken, and its full ones told to be full."""
    held = blocks.match(tokens, salt)
    found = len(held)
    held += blocks.take(-(-len(tokens) // blocks.size) - found)
    for index in range(found, len(tokens) // blocks.size):
        part = tokens[index * blocks.size : (index + 1) * blocks.size]
        blocks.fill(held[index], held[index - 1] if index else None, part, salt)
    return held


def test_a_prefix_is_found_up_to_where_texts_part() -> None:
    blocks = Blocks(16, 2)
    first = filled(blocks, [1, 2, 3, 4, 5, 6])
    assert blocks.match([1, 2, 3, 4, 5, 6], "") == first[:2], "the last token is computed always"
    assert blocks.match([1, 2, 3, 4, 5, 6, 7], "") == first
    assert blocks.match([1, 2, 9, 4, 5, 6, 7], "") == first[:1]
    assert blocks.match([3, 4, 5, 6, 7], "") == [], "the same tokens, but not behind the same"
    assert blocks.match([1, 2, 3, 4, 5], "other") == []
    assert blocks.holders[first[0]] == 4


def test_the_longest_unused_goes_first_and_texts_are_forgotten_from_their_end() -> None:
    blocks = Blocks(4, 2)
    old, new = filled(blocks, [1, 2, 3, 4]), filled(blocks, [5, 6, 7, 8])
    blocks.release(old)
    blocks.release(new)
    blocks.release(taken := blocks.take(1))
    assert taken == [old[1]]
    held = blocks.match([1, 2, 3, 4, 9], "")
    assert held == old[:1]
    blocks.release(held)
    assert set(blocks.take(3)) == {old[1], *new}


def test_a_twin_leads_nowhere_and_does_no_harm() -> None:
    blocks = Blocks(8, 2)
    one = blocks.take(2)
    two = blocks.take(2)
    for held in (one, two):
        blocks.fill(held[0], None, [1, 2], "")
        blocks.fill(held[1], held[0], [3, 4], "")
    assert blocks.match([1, 2, 3, 4, 5], "") == one
    blocks.release(one)
    blocks.release(one)
    blocks.release(two)
    assert blocks.num_free == 8


def test_random_texts_come_and_go() -> None:
    """Whatever is found holds the tokens that were asked for, by a plain record of what each block holds."""
    numbers = random.Random(0)
    blocks, content = Blocks(24, 3), {}
    live: list[list[int]] = []
    for _ in range(3000):
        if live and (numbers.random() < 0.45 or blocks.num_free < 5):
            blocks.release(live.pop(numbers.randrange(len(live))))
            continue
        tokens = [numbers.randrange(2) for _ in range(numbers.randrange(1, 15))]
        salt = numbers.choice("ab")
        known = blocks.match(tokens, salt)
        for index, block in enumerate(known):
            assert content[block] == (salt, tokens[: 3 * index + 3])
        blocks.release(known)
        held = filled(blocks, tokens, salt)
        for index in range(len(tokens) // 3):
            content[held[index]] = (salt, tokens[: 3 * index + 3])
        live.append(held)
        assert blocks.num_free == 24 - len({block for one in live for block in one})
    for held in live:
        blocks.release(held)
    assert blocks.num_free == 24
    assert 0 < blocks.hits < blocks.lookups
    blocks.forget_all()
    assert blocks.match([0, 0, 0, 0], "a") == []


def test_without_keeping_nothing_is_found() -> None:
    blocks = Blocks(4, 2, keep=False)
    filled(blocks, [1, 2, 3, 4])
    assert blocks.match([1, 2, 3, 4, 5], "") == []


def test_a_sequence_grows_in_a_row_where_nothing_is_lost_by_it() -> None:
    blocks = Blocks(8, 2)
    one, two = blocks.take(2), blocks.take(1)
    assert (one, two) == ([0, 1], [2])
    assert blocks.take(2, after=2) == [3, 4]
    blocks.release([3, 4])
    assert blocks.take(1, after=2) == [3], "though 5 has been free for longer"
    blocks.fill(3, None, [1, 2], "")
    blocks.release([3])
    assert blocks.take(1, after=2) == [5], "3 can still be found"
