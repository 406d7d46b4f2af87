"""Rank arithmetic against grids of ranks that numpy cuts up."""

from __future__ import annotations

import re
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from drivetrain.contracts import ATOMS, Atom, NamedAxis, SplitAxis
from drivetrain.errors import ConfigError
from drivetrain.plan.mesh_layout import MeshLayout

SIZES = st.fixed_dictionaries({name: st.sampled_from([1, 2, 3, 4]) for name in ATOMS})
NAMES = st.lists(st.sampled_from(ATOMS), min_size=1, max_size=4, unique=True)


def layout_of(sizes: dict[str, int], *others) -> MeshLayout:
    world = int(np.prod(list(sizes.values())))
    given_sizes = [Atom(name, size) for name, size in sizes.items() if name != "dp"]
    return MeshLayout.build(world, [*given_sizes, *others])


def numpy_groups(grid: np.ndarray, kept: list[int]) -> set[tuple[int, ...]]:
    """Groups along the dimensions ``kept`` of a grid of ranks, by moving them to the back."""
    others = [dim for dim in range(grid.ndim) if dim not in kept]
    rows = grid.transpose(others + sorted(kept)).reshape(-1, np.prod([grid.shape[d] for d in kept]))
    return {tuple(int(rank) for rank in sorted(row)) for row in rows}


def groups(layout: MeshLayout, axis) -> list[tuple[int, ...]]:
    """The groups that all ranks say they are in, in order."""
    return sorted({layout.group(rank, axis) for rank in range(layout.world_size)})


@given(SIZES, NAMES)
def test_groups_are_the_rows_of_the_grid_of_ranks(sizes, names):
    layout = layout_of(sizes)
    grid = np.arange(layout.world_size).reshape([sizes[name] for name in ATOMS])
    expected = numpy_groups(grid, [ATOMS.index(name) for name in names])
    assert set(groups(layout, tuple(names))) == expected


@given(SIZES, NAMES)
def test_every_rank_is_at_its_coordinate_of_its_group(sizes, names):
    layout = layout_of(sizes)
    axis = tuple(names)
    for rank in range(layout.world_size):
        group = layout.group(rank, axis)
        assert len(group) == layout.size(axis)
        assert group[layout.coordinate(rank, axis)] == rank


@given(SIZES, st.sampled_from([("sp", "dp"), ("tp", "sp", "dp"), ("dp",)]), st.data())
def test_a_split_axis_takes_the_innermost_parts_of_its_atoms(sizes, within, data):
    divisors: list[int] = [1]
    whole = 1
    for name in within:  # sizes that take atoms whole and split the last one
        divisors += [whole * d for d in range(1, sizes[name] + 1) if sizes[name] % d == 0]
        whole *= sizes[name]
    size = data.draw(st.sampled_from(divisors))
    layout = layout_of(sizes, SplitAxis("ep", size, within=within))
    # Reference: cut every atom in two, outer and inner part, in a grid of eight dimensions.
    missing, inner = size, dict.fromkeys(ATOMS, 1)
    for name in within:
        inner[name] = int(np.gcd(missing, sizes[name]))
        missing //= inner[name]
    shape = [part for name in ATOMS for part in (sizes[name] // inner[name], inner[name])]
    grid = np.arange(layout.world_size).reshape(shape)
    ep = [2 * ATOMS.index(name) + 1 for name in within]
    edp = [2 * ATOMS.index(name) for name in within]
    assert set(groups(layout, "ep")) == numpy_groups(grid, ep)
    assert set(groups(layout, "edp")) == numpy_groups(grid, edp)
    assert layout.size("ep") == size
    assert groups(layout, ("ep", "edp")) == groups(layout, within)


def test_experts_lie_on_neighbouring_ranks():
    layout = MeshLayout.build(8, [Atom("sp", 2), SplitAxis("ep", 4)])
    assert groups(layout, "ep") == [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert groups(layout, "edp") == [(0, 4), (1, 5), (2, 6), (3, 7)]


def test_folded_experts_use_tensor_parallel_ranks_first():
    layout = MeshLayout.build(8, [Atom("tp", 2), SplitAxis("ep", 4, within=("tp", "sp", "dp"))])
    assert groups(layout, "ep") == [(0, 1, 2, 3), (4, 5, 6, 7)]
    unfolded = MeshLayout.build(8, [Atom("tp", 2), SplitAxis("ep", 4)])
    assert groups(unfolded, "ep") == [(0, 2, 4, 6), (1, 3, 5, 7)]


def test_built_in_axes():
    layout = MeshLayout.build(24, [Atom("pp", 2), Atom("sp", 3), Atom("tp", 2)])
    assert layout.size("dp") == 2
    assert layout.group(0, "data") == (0, 2, 4, 6, 8, 10)
    assert layout.group(0, "model") == (0, 1, 12, 13)
    assert layout.group(7, "world") == tuple(range(24))


def test_the_order_of_names_does_not_matter():
    layout = MeshLayout.build(8, [Atom("tp", 2)])
    assert layout.group(3, ("tp", "dp")) == layout.group(3, ("dp", "tp")) == tuple(range(8))
    assert layout.coordinate(3, ("tp", "dp")) == 3


def test_a_sub_axis_is_some_positions_of_an_axis():
    layout = MeshLayout.build(8, [Atom("pp", 4)])
    ends = layout.sub_axis("pp", (3, 0))
    assert layout.size(ends) == 2
    assert groups(layout, ends) == [(0, 6), (1, 7)]
    assert layout.coordinate(7, ends) == 1
    with pytest.raises(ConfigError, match="rank 2 is at position 1 of axis 'pp'"):
        layout.coordinate(2, ends)
    for bad in ((0, 4), (1, 1), ()):
        with pytest.raises(ConfigError, match="positions"):
            layout.sub_axis("pp", bad)


@pytest.mark.parametrize(
    ("world", "requests", "message"),
    [
        (8, [Atom("tp", 3)], "8 ranks cannot be divided into parts of tp 3 = 3 ranks: 8 / 3"),
        (8, [Atom("dp", 3), Atom("tp", 2)], "dp 3 x tp 2 needs 6 ranks, but the world has 8"),
        (8, [SplitAxis("ep", 3)], "ep 3 does not nest in sp 1 x dp 8 = 8 ranks"),
        (8, [Atom("sp", 4), SplitAxis("ep", 6)], "at sp, 6 is left to be made of 4"),
        (8, [SplitAxis("ep", 16)], "ep 16 does not nest"),
        (8, [Atom("cp", 2)], "unknown mesh atom 'cp'"),
        (8, [Atom("tp", 0, "a.b")], "a.b: mesh atom 'tp' needs a size of at least 1"),
        (8, [Atom("sp", 2, "a"), Atom("sp", 4, "b")], "two sizes: a: 2 and b: 4"),
        (8, [NamedAxis("data", ("sp",))], "'data' is requested twice"),
        (8, [SplitAxis("tp", 2)], "'tp' is requested twice"),
        (8, [NamedAxis("x", ("ep",))], "made of 'ep', which is no atom"),
        (0, [], "at least one rank"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_arithmetic(world, requests, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        MeshLayout.build(world, requests)


def test_equal_requests_may_repeat():
    twice = [SplitAxis("ep", 2, source="moe"), Atom("sp", 2)] * 2
    assert MeshLayout.build(8, twice).size("ep") == 2


def test_overlapping_axes_have_no_product():
    layout = MeshLayout.build(8, [SplitAxis("ep", 2)])
    with pytest.raises(ConfigError, match="overlap, so they have no product"):
        layout.size(("data", "ep"))


def test_unknown_axes_and_ranks_are_named():
    layout = MeshLayout.build(4)
    with pytest.raises(ConfigError, match=r"unknown mesh axis 'edp'; this job has .*data"):
        layout.size("edp")
    with pytest.raises(ConfigError, match="rank 4 is not in a world of 4"):
        layout.group(4, "data")


def test_queries_cost_as_much_as_their_answer():
    # Anything that walked over the world would never end at a million million ranks.
    world = 10**12
    layout = MeshLayout.build(world, [Atom("pp", 5), Atom("tp", 8), SplitAxis("ep", 4)])
    last = world - 1
    assert layout.group(last, "tp") == tuple(range(world - 8, world))
    assert layout.group(last, "ep") == tuple(range(world - 25, world, 8))
    assert layout.coordinate(last, "data") == world // 40 - 1


def test_the_module_loads_no_torch():
    script = "import sys, drivetrain.plan.mesh_layout; sys.exit('torch' in sys.modules)"
    path = f"import sys; sys.path[:] = {sys.path!r}; "
    assert subprocess.run([sys.executable, "-c", path + script], check=False).returncode == 0
