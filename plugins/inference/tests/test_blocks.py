"""Blocks are shared, copied before writes, and never lost."""

from __future__ import annotations

import random

import pytest
from drivetrain_inference import BlockManager, OutOfBlocksError
from drivetrain_inference.cache.blocks import BlockTable


def filled(manager, tokens):
    table = manager.begin(tokens)
    manager.extend(table, len(tokens) - table.length)
    manager.commit(table, tokens)
    return table


def test_sequences_that_begin_alike_share_full_blocks():
    manager = BlockManager(8, 4)
    one = filled(manager, list(range(11)))
    other = manager.begin([*range(8), 99, 98])
    assert other.blocks == one.blocks[:2]
    assert other.length == 8
    manager.check([one, other])


def test_the_last_token_is_always_left_to_compute():
    manager = BlockManager(8, 4)
    filled(manager, list(range(8)))
    assert manager.begin(list(range(8))).length == 4


def test_a_block_is_the_same_only_if_all_before_it_is():
    manager = BlockManager(8, 4)
    filled(manager, [1, 1, 1, 1, 2, 2, 2, 2])
    assert manager.begin([3, 3, 3, 3, 2, 2, 2, 2, 0]).blocks == []


def test_released_blocks_are_found_until_they_are_needed():
    manager = BlockManager(3, 4)
    table = filled(manager, list(range(8)))
    first = list(table.blocks)
    manager.release(table)
    found = manager.begin(list(range(9)))
    assert found.blocks == first
    manager.release(found)
    other = filled(manager, [50] * 12)
    assert manager.begin(list(range(9))).blocks == []
    manager.check([other])


def test_a_fork_shares_its_blocks_until_one_of_them_writes():
    manager = BlockManager(8, 4)
    table = filled(manager, list(range(6)))
    fork = manager.fork(table)
    assert manager.needed(fork, 1) == 1
    (copy,) = manager.extend(fork, 1)
    assert copy == (table.blocks[1], fork.blocks[1])
    assert table.blocks[0] == fork.blocks[0]
    assert manager.extend(table, 1) == []  # nobody else has it any more
    manager.check([table, fork])


def test_too_few_blocks_change_nothing():
    manager = BlockManager(2, 4)
    table = filled(manager, list(range(4)))
    with pytest.raises(OutOfBlocksError, match="need 2 blocks, 1 are free"):
        manager.extend(table, 5)
    manager.check([table])


def test_without_prefix_caching_nothing_is_shared():
    manager = BlockManager(8, 4, prefix_caching=False)
    filled(manager, list(range(8)))
    assert manager.begin(list(range(9))).blocks == []


def test_blocks_of_a_source_are_found_only_once_all_of_it_is_encoded():
    manager = BlockManager(8, 4)
    source = tuple(range(1, 7))  # it takes two blocks, of which the second is not full
    room, decoder = [*source, 0, 0], [20, 21, 22, 23, 24]
    whole = [*room, *decoder]
    table = manager.begin(whole, source=source)
    manager.extend(table, 4)
    manager.commit(table, room[:4])  # an encoder that sees both ways has nothing to write yet
    early = manager.begin(whole, source=source)
    assert (early.blocks, early.length) == ([], 0)
    manager.extend(table, 9)
    manager.commit(table, whole)
    late = manager.begin(whole, source=source)
    assert (late.blocks, late.length) == (table.blocks[:3], 12)
    manager.check([table, early, late])


@pytest.mark.parametrize("seed", range(5))
def test_random_use_keeps_the_books(seed):
    draw, manager = random.Random(seed), BlockManager(24, 4)
    tables: list[tuple[BlockTable, list[int]]] = []
    for _ in range(400):
        act = draw.choice(("begin", "begin", "extend", "extend", "fork", "release"))
        if act == "begin":
            tokens = [draw.randrange(2) for _ in range(draw.randrange(1, 20))]
            table = manager.begin(tokens)
            if manager.needed(table, len(tokens) - table.length) <= manager.free:
                manager.extend(table, len(tokens) - table.length)
                manager.commit(table, tokens)
                tables.append((table, tokens))
            else:
                manager.release(table)
        elif tables:
            table, tokens = draw.choice(tables)
            if act == "extend" and manager.needed(table, 1) <= manager.free:
                manager.extend(table, 1)
                tokens.append(draw.randrange(2))
                manager.commit(table, tokens)
            elif act == "fork":
                tables.append((manager.fork(table), list(tokens)))
            elif act == "release":
                tables.remove((table, tokens))
                manager.release(table)
        manager.check(table for table, _ in tables)
