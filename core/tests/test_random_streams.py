from __future__ import annotations

import json

import pytest
import torch

from drivetrain.communication.mesh import Mesh
from drivetrain.contracts import Atom
from drivetrain.errors import ConfigError
from drivetrain.job.random_streams import RandomStreams
from drivetrain.plan.mesh_layout import MeshLayout

CPU = torch.device("cpu")


def streams(rank: int = 0, seed: int = 7, world: int = 8) -> RandomStreams:
    layout = MeshLayout.build(world, [Atom("pp", 2), Atom("tp", 2)])
    return RandomStreams(seed, Mesh(layout, rank), CPU)


def draw(streams_: RandomStreams, name: str) -> torch.Tensor:
    return torch.rand(8, generator=streams_.generator(name))


def same_ranks(name: str, rank: int) -> list[int]:
    """Ranks whose stream equals that of ``rank``."""
    mine = draw(streams(rank), name)
    return [other for other in range(8) if torch.equal(draw(streams(other), name), mine)]


def test_ranks_agree_but_along_the_streams_axes():
    # pp 2 x dp 2 x tp 2: rank = 4 pp + 2 dp + tp
    assert same_ranks("data", 0) == [0, 1, 4, 5]
    assert same_ranks("model", 5) == [5, 7]
    assert same_ranks("dropout", 0) == [0, 1]


def test_streams_and_seeds_are_unlike_each_other():
    numbers = [
        tuple(draw(streams(rank, seed), name).tolist())
        for seed in (0, 1, 2)
        for rank in (0, 2)  # these differ along dp
        for name in ("data", "dropout")
    ]
    assert len(set(numbers)) == len(numbers)


def test_the_next_seed_is_not_the_next_rank():
    by_rank = {tuple(draw(streams(rank, seed=1), "data").tolist()) for rank in range(8)}
    by_seed = {tuple(draw(streams(0, seed=seed), "data").tolist()) for seed in range(2, 40)}
    assert not by_rank & by_seed


def test_declared_streams_differ_along_their_axes():
    one, other = streams(0), streams(1)
    for side in (one, other):
        side.declare("tensor", ("tp",))
        side.declare("common", ())
    assert not torch.equal(draw(one, "tensor"), draw(other, "tensor"))
    assert torch.equal(draw(one, "common"), draw(other, "common"))


def test_a_stream_has_one_set_of_axes():
    with pytest.raises(ConfigError, match=r"'data' differs along .*dp.*tp"):
        streams().declare("data", ("tp",))
    with pytest.raises(ConfigError, match="no random stream is declared as 'dada'; there are"):
        streams().generator("dada")


def test_fork_draws_from_the_stream_and_leaves_the_default_alone():
    forked, direct = streams(), streams()
    torch.manual_seed(3)
    expected_default = torch.rand(4)
    torch.manual_seed(3)
    with forked.fork("dropout"):
        first = torch.rand(4)
    assert torch.equal(torch.rand(4), expected_default)
    with forked.fork("dropout"):
        second = torch.rand(4)
    generator = direct.generator("dropout")
    assert torch.equal(first, torch.rand(4, generator=generator))
    assert torch.equal(second, torch.rand(4, generator=generator))


def test_fork_restores_the_default_after_an_exception():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    with pytest.raises(ValueError), streams().fork("dropout"):  # noqa: PT012
        torch.rand(4)
        raise ValueError
    assert torch.equal(torch.get_rng_state(), state)


def test_saved_streams_go_on_where_they_were():
    one = streams()
    one.declare("tensor", ("tp",))
    draw(one, "dropout")
    draw(one, "tensor")
    state = json.loads(json.dumps(one.state_dict()))
    expected = [draw(one, name) for name in ("dropout", "tensor", "data")]
    other = streams(seed=99)
    draw(other, "data")  # drawn from before the load, so it must be forgotten
    other.load_state_dict(state)
    for name, numbers in zip(("dropout", "tensor", "data"), expected, strict=True):
        assert torch.equal(draw(other, name), numbers), name


def test_streams_repeat_what_they_drew_and_go_on():
    side = streams()
    side.declare("own", ("tp",))
    side.generator("data")
    positions = side.positions()
    first = draw(side, "data"), draw(side, "own")  # which is used for the first time
    second = draw(side, "data")
    with side.repeat(positions):
        again = draw(side, "data"), draw(side, "own")
    assert torch.equal(again[0], first[0])
    assert torch.equal(again[1], first[1])
    other = streams()
    other.declare("own", ("tp",))
    assert torch.equal(
        torch.cat([draw(other, "data") for _ in range(2)]), torch.cat([first[0], second])
    )
    draw(other, "own")
    assert torch.equal(draw(side, "data"), draw(other, "data"))
    assert torch.equal(draw(side, "own"), draw(other, "own"))


def test_a_fork_inside_of_what_is_repeated_draws_alike():
    side = streams()
    with side.fork("dropout"):
        positions, begin = side.positions(), torch.get_rng_state()
        with side.fork("dropout"), side.fork("model"):
            first = torch.rand(4)
        with side.fork("dropout"):
            second = torch.rand(4)
    torch.set_rng_state(begin)  # as torch.utils.checkpoint does in backward
    with side.repeat(positions):
        with side.fork("dropout"), side.fork("model"):
            assert torch.equal(torch.rand(4), first)
        with side.fork("dropout"):
            assert torch.equal(torch.rand(4), second)
