"""Grids of ranks, and parts of lists, as scripts of DeepSpeed describe them."""

from __future__ import annotations

import pytest
from drivetrain_pipeline.parts import partition_balanced, partition_uniform, prefix_sum_inc
from drivetrain_pipeline.topology import (
    PipeDataParallelTopology,
    PipeModelDataParallelTopology,
    ProcessTopology,
)

from drivetrain.errors import ConfigError


def test_ranks_count_along_the_last_axis_first():
    grid = PipeModelDataParallelTopology(num_pp=2, num_mp=3, num_dp=4)
    assert grid.get_axis_names() == ["pipe", "data", "model"]
    assert (grid.world_size(), grid.get_dim("model"), grid.get_dim("other")) == (24, 3, 0)
    for rank in range(24):
        place = grid.get_coord(rank)
        assert rank == (place.pipe * 4 + place.data) * 3 + place.model
        assert grid.get_rank(pipe=place.pipe, data=place.data, model=place.model) == rank
    assert grid.get_axis_list("pipe", 1) == list(range(12, 24))
    assert grid.filter_match(pipe=0, model=2) == [2, 5, 8, 11]


def test_groups_of_an_axis_hold_every_rank_once():
    grid = ProcessTopology(["a", "b"], [2, 3])
    assert grid.get_axis_comm_lists("a") == [[0, 3], [1, 4], [2, 5]]
    assert grid.get_axis_comm_lists("b") == [[0, 1, 2], [3, 4, 5]]
    assert grid.get_axis_comm_lists("c") == []


def test_places_are_names_for_files():
    assert PipeDataParallelTopology(2, 2).get_rank_repr(3) == ""
    assert PipeDataParallelTopology(2, 2).get_rank_repr(3, omit_axes=[]) == "pipe_01-data_01"
    grid = PipeModelDataParallelTopology(1, 2, 1)
    assert grid.get_rank_repr(1) == "model_01"
    assert grid.get_rank_repr(1, omit_axes=["pipe"], inner_sep="=", outer_sep="/") == (
        "data=00/model=01"
    )


def test_places_that_do_not_exist_are_refused():
    grid = ProcessTopology(["a", "b"], [2, 2])
    with pytest.raises(ConfigError, match="no rank is at"):
        grid.get_rank(a=0, b=2)
    with pytest.raises(ConfigError, match="use filter_match"):
        grid.get_rank(a=0)
    with pytest.raises(ConfigError, match="no axis c in a grid a=2 x b=2"):
        grid.filter_match(c=0)
    with pytest.raises(ConfigError, match="rank 4 is not among the 4"):
        grid.get_coord(4)
    with pytest.raises(ConfigError, match="one size for each axis"):
        ProcessTopology(["a"], [1, 2])
    with pytest.raises(ConfigError, match="must be positive"):
        ProcessTopology(["a"], [0])


def test_parts_are_as_equal_as_can_be():
    assert partition_uniform(10, 4) == [0, 3, 6, 8, 10]
    assert partition_uniform(2, 4) == [0, 1, 2, 2, 2]
    assert partition_balanced([0, 1, 2, 3, 3, 3], 4) == [0, 3, 4, 5, 6]
    assert partition_balanced([0.0, 1.1, 30, 3.0], 3) == [0, 2, 3, 4]
    assert partition_balanced([5, 1], 3) == [0, 1, 2, 2]
    assert prefix_sum_inc([3, 4, 5]) == [3, 7, 12]
