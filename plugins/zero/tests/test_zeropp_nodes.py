"""Which two hops a sum takes across nodes, and where it takes one."""

from __future__ import annotations

import pytest
from drivetrain_zero.compressed.nodes import Hops, find_hops

from drivetrain.contracts import SubAxis


def test_two_nodes_of_two_ranks_make_two_hops():
    assert find_hops("data", [0, 0, 1, 1], 1) == Hops(
        inside=SubAxis("data", (0, 1)), across=SubAxis("data", (1, 3)), order=(0, 2, 1, 3)
    )
    assert find_hops("data", [0, 0, 1, 1], 2) == Hops(
        inside=SubAxis("data", (2, 3)), across=SubAxis("data", (0, 2)), order=(0, 2, 1, 3)
    )


@pytest.mark.parametrize("nodes", [[0] * 4 + [4] * 4 + [8] * 4, [0, 1, 2] * 4])
def test_what_ranks_exchange_in_two_hops_arrives_where_it_belongs(nodes):
    """Walks every slice: sent by rank s for rank d, over the two hops of ``order``."""
    hops = [find_hops("data", nodes, position) for position in range(12)]
    assert all(h is not None and h.order == hops[0].order for h in hops)
    (per_node,) = {len(h.inside.positions) for h in hops}
    across = 12 // per_node
    arrived = {d: set() for d in range(12)}
    for source in range(12):
        for at, destination in enumerate(hops[source].order):
            # The first hop hands out equal runs of ``order`` by place inside the node.
            middle = hops[source].inside.positions[at // across]
            # The second hands out the entries of a run by place across nodes.
            last = hops[middle].across.positions[at % across]
            assert last == destination
            arrived[last].add(source)
    assert all(sources == set(range(12)) for sources in arrived.values())


@pytest.mark.parametrize(
    ("axis", "nodes"),
    [
        ("data", [0, 0, 0, 0]),
        ("data", [0, 1, 2, 3]),
        ("data", [0, 0, 0, 1]),
        ("data", [0, 1, 1, 0]),
        (SubAxis("pp", (0, 3)), [0, 1]),
    ],
    ids=["one node", "one rank a node", "uneven", "crossed", "tied weights"],
)
def test_one_hop_where_two_would_gain_nothing_or_lead_astray(axis, nodes):
    assert find_hops(axis, nodes, 0) is None
