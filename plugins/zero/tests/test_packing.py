"""Where parameters lie: every element in one shard, shards equal, padding small."""

from __future__ import annotations

import pytest
from drivetrain_zero.shards.packing import ALIGNMENT, WORTH_PAGES, pack
from hypothesis import given
from hypothesis import strategies as st

NUMELS = st.lists(st.integers(0, 500), min_size=1, max_size=12)
RANKS = st.integers(1, 9)
GRAINS = st.sampled_from(["element", "tensor"])


@given(NUMELS, RANKS, GRAINS, st.sampled_from([0, 64]))
def test_every_element_lies_in_exactly_one_shard(numels, ranks, grain, page) -> None:
    packing = pack(numels, ranks, grain, page)
    seen = [[0] * numel for numel in numels]
    for rank in range(ranks):
        for part in packing.parts(rank):
            assert 0 <= part.offset <= part.offset + part.numel <= packing.shard
            assert packing.offsets[part.index] + part.start == rank * packing.shard + part.offset
            for element in range(part.start, part.start + part.numel):
                seen[part.index][element] += 1
    assert all(count == 1 for counts in seen for count in counts)


@given(NUMELS, RANKS, GRAINS)
def test_parameters_and_padding_fill_the_whole(numels, ranks, grain) -> None:
    packing = pack(numels, ranks, grain)
    covered = sum(numels) + sum(numel for _, numel in packing.gaps())
    assert covered == packing.numel == ranks * packing.shard


@given(NUMELS, RANKS)
def test_whole_tensors_are_never_cut(numels, ranks) -> None:
    packing = pack(numels, ranks, "tensor")
    parts = [part for rank in range(ranks) for part in packing.parts(rank)]
    assert sorted(part.index for part in parts) == list(range(len(numels)))
    assert all(part.numel == numels[part.index] for part in parts)


@given(NUMELS, RANKS)
def test_every_parameter_begins_in_some_shard(numels, ranks) -> None:
    """Also one without elements, which a checkpoint must not lose."""
    packing = pack(numels, ranks, "element")
    first = {part.index for rank in range(ranks) for part in packing.parts(rank) if not part.start}
    assert first == set(range(len(numels)))


def test_padding_is_less_than_a_cache_line_for_each_rank() -> None:
    packing = pack([1000, 7, 13], 8, "element")
    assert packing.numel - 1020 < 8 * ALIGNMENT


def test_large_shards_are_whole_pages_at_little_cost() -> None:
    page = 1024
    small = pack([2 * (WORTH_PAGES * page - 100)], 2, "element", page)
    assert small.shard % page
    large = pack([2 * (WORTH_PAGES * page + 100)], 2, "element", page)
    assert large.shard % page == 0
    assert large.shard <= 1.016 * (WORTH_PAGES * page + 100)


def test_tensors_are_spread_evenly() -> None:
    packing = pack([60, 50, 40, 30, 20, 10], 3, "tensor")
    assert packing.shard == pytest.approx(70, abs=ALIGNMENT)
