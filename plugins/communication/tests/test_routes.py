"""Collectives go the way that rules or a table say, and bring the same numbers on every way."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from drivetrain_communication.routes.hierarchy import Hierarchical, find_levels
from drivetrain_communication.routes.presence import missing
from drivetrain_communication.routes.router import Router
from drivetrain_communication.routes.section import RoutesSection, Rule
from drivetrain_communication.routes.table import Shape, Table
from drivetrain_communication.routes.through_host import ThroughHost
from interleaved import KINDS, TAG, one, open_job, run_all
from interleaved import values as drawn

from drivetrain.communication.process_group import Ranks
from drivetrain.contracts import (
    Collective,
    Communicator,
    CommunicatorWrapper,
    Handle,
    Kind,
    Op,
    SubAxis,
)
from drivetrain.errors import ConfigError
from drivetrain.plan.plan import Plan
from drivetrain.testing import run_distributed

HOSTS = {"blocks": [0, 0, 1, 1], "turns": [0, 1, 0, 1]}


@dataclass(frozen=True)
class Moved:
    """Positions between which a hop goes, its bytes, and those that leave this rank."""

    positions: tuple[int, ...]
    nbytes: int
    leaving: int = 0


class Recorder(CommunicatorWrapper):
    """Notes which ranks take part in what."""

    def __init__(self, inner: Communicator) -> None:
        super().__init__(inner)
        self.seen: list[tuple[str, int]] = []
        self.moved: list[Moved] = []

    def run(self, collective: Collective) -> Handle:
        self.seen.append((str(collective.kind), self.size(collective.axis)))
        if isinstance(collective.axis, SubAxis):
            self.moved.append(Moved(collective.axis.positions, collective.input.nbytes))
            if collective.input_splits:
                own = collective.input_splits[self.rank(collective.axis)]
                kept = collective.input[:own].nbytes
                self.moved[-1] = replace(self.moved[-1], leaving=collective.input.nbytes - kept)
        return super().run(collective)


def values(rank: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rank)
    return torch.randint(-50, 50, (numel,), generator=generator).to(dtype)


def collectives(layout: str) -> list[Any]:
    with open_job(hierarchical=False) as job:
        recorder = Recorder(job.communicator)
        comm = Hierarchical(recorder, job.mesh.ranks, HOSTS[layout])
        found: list[Any] = []
        for numel in (1, 2, 3, 8, 1001):
            for dtype in (torch.float32, torch.int64):
                for op in (Op.SUM, Op.MAX):
                    tensor = values(job.rank, numel, dtype)
                    comm.all_reduce(tensor, "world", TAG, op=op, asynchronous=True).wait()
                    found.append(tensor)
        recorder.seen.clear()
        tensor = values(job.rank, 8, torch.float32)
        comm.all_reduce(tensor, "world", TAG)
        rows = values(job.rank, 24, torch.float32).view(4, 2, 3)
        came = torch.empty_like(rows)
        comm.all_to_all(came, rows, "world", TAG, asynchronous=True).wait()
        return [found, came, recorder.seen]


def sent_rows(source: int, target: int) -> torch.Tensor:
    """What one rank has for another: other numbers of rows, and none for some."""
    count = (source * 3 + target * 5) % 4
    return torch.arange(count * 2).view(count, 2) + 100 * source + 1000 * target


def unequal(layout: str) -> list[Any]:
    with open_job(hierarchical=False) as job:
        recorder = Recorder(job.communicator)
        comm = Hierarchical(recorder, job.mesh.ranks, HOSTS[layout])
        rank, found = job.rank, []
        for asynchronous in (True, False):
            recorder.seen.clear()
            recorder.moved.clear()
            rows = torch.cat([sent_rows(rank, target) for target in range(4)])
            to = [len(sent_rows(rank, target)) for target in range(4)]
            of = [len(sent_rows(source, rank)) for source in range(4)]
            came = rows.new_empty(sum(of), 2)
            handle = comm.all_to_all(
                *(came, rows, "world", TAG),
                output_splits=of,
                input_splits=to,
                asynchronous=asynchronous,
            )
            handle.wait()
            handle.wait()
            found.append(came)
        return [found, recorder.seen, recorder.moved]


@pytest.mark.parametrize("layout", HOSTS)
def test_slices_of_other_sizes_take_two_levels_and_no_more_bytes_between_hosts(layout: str) -> None:
    hosts, between = HOSTS[layout], 0
    for rank, (found, seen, moved) in enumerate(run_distributed(unequal, 4, layout)):
        for came in found:
            assert torch.equal(came, torch.cat([sent_rows(source, rank) for source in range(4)]))
        # Counts and rows inside the host, then rows between ranks of the same place.
        assert seen == [(str(Kind.ALL_TO_ALL), 2)] * 3
        counts, inside, across = moved
        assert counts.nbytes == 2 * 2 * 8  # for each place on this host, and each host
        assert [hosts[position] for position in inside.positions] == [hosts[rank]] * 2
        assert inside.nbytes == sum(sent_rows(rank, target).nbytes for target in range(4))
        assert [hosts[position] for position in across.positions] == [0, 1]
        between += across.leaving
    # Together, ranks send each row for another host to it once.
    assert between == sum(
        sent_rows(source, target).nbytes
        for source in range(4)
        for target in range(4)
        if hosts[source] != hosts[target]
    )


def through_the_config(minimum: int) -> torch.Tensor:
    with open_job(ranks_per_host=2, minimum_bytes=minimum) as job:
        tensor = values(job.rank, 100, torch.float32)
        job.communicator.all_reduce(tensor, "data", TAG)
        return tensor


@pytest.mark.parametrize("layout", HOSTS)
def test_two_levels_bring_the_numbers_of_one_hop(layout: str) -> None:
    answers = run_distributed(collectives, 4, layout)
    for rank, (found, came, seen) in enumerate(answers):
        results = iter(found)
        for numel in (1, 2, 3, 8, 1001):
            for dtype in (torch.float32, torch.int64):
                every = torch.stack([values(r, numel, dtype) for r in range(4)])
                assert torch.equal(next(results), every.sum(0))
                assert torch.equal(next(results), every.amax(0))
        sent = [values(r, 24, torch.float32).view(4, 2, 3)[rank] for r in range(4)]
        assert torch.equal(came, torch.stack(sent))
        # No hop has all four ranks: two share a host, two are of the same place.
        hops = [Kind.REDUCE_SCATTER, Kind.ALL_REDUCE, Kind.ALL_GATHER, *[Kind.ALL_TO_ALL] * 2]
        assert seen == [(str(kind), 2) for kind in hops]


@pytest.mark.parametrize("minimum", [0, 1 << 20])
def test_the_section_switches_it_on(minimum: int) -> None:
    expected = torch.stack([values(r, 100, torch.float32) for r in range(4)]).sum(0)
    for tensor in run_distributed(through_the_config, 4, minimum):
        assert torch.equal(tensor, expected)


def test_one_hop_it_is_where_two_would_be_no_better() -> None:
    assert find_levels("data", [0, 0, 0, 0], 1) is None  # one host
    assert find_levels("data", [0, 1, 2, 3], 1) is None  # a rank each
    assert find_levels("data", [0, 0, 1], 1) is None  # uneven
    assert find_levels("data", [0, 1, 1, 0], 1) is None  # places in another order
    assert find_levels(SubAxis("pp", (0, 3)), [0, 1], 0) is None
    levels = find_levels("data", [5, 5, 9, 9], 2)
    assert levels is not None
    assert levels.inside == SubAxis("data", (2, 3))
    assert levels.across == SubAxis("data", (0, 2))


def test_hosts_that_do_not_divide_the_ranks_are_refused() -> None:
    with pytest.raises(ConfigError, match="ranks_per_host: is 3, which does not divide the 4"):
        Plan.build(
            {"train_batch_size": 4, "communication": {"routes": {"ranks_per_host": 3}}},
            world_size=4,
        )


def chosen() -> list[str]:
    """Which route each of several collectives takes, by rules alone."""
    from drivetrain_communication.routes.plugin import routers

    rules = [
        {"collective": "all_reduce", "below_bytes": 1000, "route": "gloo"},
        {"collective": "all_reduce", "at_least_bytes": 4000, "route": "two_levels"},
        {"axis": "world", "route": "gloo"},
        {"collective": "all_gather", "route": "two_levels"},  # which cannot carry it
    ]
    with open_job(rules=rules, ranks_per_host=2, hierarchical=False) as job:
        found = []
        for kind, axis, numel in ASKED:
            tensors = (torch.empty(numel),) * 2
            found.append(routers[job].route_of(Collective(kind, tensors, axis, TAG)))
        return found


ASKED: list[tuple[Kind, str, int]] = [
    (Kind.ALL_REDUCE, "data", 200),
    (Kind.ALL_REDUCE, "data", 500),
    (Kind.ALL_REDUCE, "data", 1000),
    (Kind.ALL_TO_ALL, "world", 1000),
    (Kind.ALL_TO_ALL, "data", 1000),
    (Kind.ALL_GATHER, "data", 1000),
]


def test_the_first_rule_that_fits_and_can_carry_it_decides() -> None:
    expected = ["gloo", "job", "two_levels", "gloo", "job", "job"]
    assert run_distributed(chosen, 4) == [expected] * 4


def many_at_once(turns: int) -> tuple[list[str], list[str]]:
    from drivetrain_communication.routes.plugin import routers

    rules = [
        {"collective": "all_reduce", "at_least_bytes": 2000, "route": "two_levels"},
        {"collective": "all_gather", "route": "gloo"},
        {"collective": "all_to_all", "route": "two_levels"},
    ]
    with open_job(rules=rules, ranks_per_host=2) as job:
        wrong = run_all(job, turns)
        return wrong, sorted({route for _, _, route in routers[job].taken})


def test_ranks_that_wait_in_other_orders_never_hang_and_get_the_right_numbers() -> None:
    for wrong, routes in run_distributed(many_at_once, 4, 150):
        assert wrong == []
        assert routes == ["gloo", "job", "two_levels"]


def tuned(folder: str) -> list[Any]:
    """Measure, use the table, then find out which of others are refused."""
    from drivetrain_communication.routes.plugin import routers
    from drivetrain_communication.routes.tune import tune

    path, rank = Path(folder, "routes.json"), Ranks.current().rank
    with open_job(ranks_per_host=2) as job:
        kinds = ["all_reduce", "all_gather"]
        table = tune(job, routers[job], ["world", "data"], kinds, [1024, 65536], 1e-4)
        shapes = {shape for _, shape in table.best}
        # That of the world, and those of its two levels.
        assert shapes == {Shape(4, 2), Shape(2, 1), Shape(2, 2)}
        routes = {name for row in table.measured for name in row["seconds"]}
        assert {"job", "gloo", "two_levels"} <= routes
        # What is measured is noise; what is written below is known.
        table.best["all_reduce", Shape(4, 2)] = [(0, "gloo"), (4096, "two_levels")]
        if rank == 0:
            path.write_text(table.dumps())
            other = replace(table, cluster={**table.cluster, "ranks_of_hosts": [4]})
            Path(folder, "other.json").write_text(other.dumps())
            Path(folder, "broken.json").write_text('{"format": 3}')
            Path(folder, "doves.json").write_text(table.dumps().replace('"gloo"', '"doves"'))
        job.communicator.barrier("world", TAG)
    found: list[Any] = []
    with open_job(ranks_per_host=2, table=str(path)) as job:
        for numel in (10, 1 << 20):
            tensor = drawn(rank, numel, 0)
            c = Collective(Kind.ALL_REDUCE, (tensor,), "data", TAG)
            found.append(routers[job].route_of(c))
            job.communicator.run(c)
            found.append(
                torch.equal(tensor, torch.stack([drawn(r, numel, 0) for r in range(4)]).sum(0))
            )
    for name in ("other.json", "broken.json", "none.json", "doves.json"):
        with pytest.raises(ConfigError) as caught:
            open_job(ranks_per_host=2, table=f"{folder}/{name}")
        found.append(str(caught.value))
    return found


def test_a_measured_table_decides_and_one_of_another_cluster_is_refused(tmp_path: Path) -> None:
    for rank in run_distributed(tuned, 4, str(tmp_path)):
        assert rank[:4] == ["gloo", True, "two_levels", True]
        other, broken, none, doves = rank[4:]
        assert "was measured on another cluster, 4 ranks on hosts of" in other
        assert "this one is 2 + 2 ranks on hosts of" in other
        assert "drivetrain comm tune" in other
        assert "broken.json: its format is 3" in broken
        assert "none.json: No such file" in none
        assert "doves.json: it names a route that does not exist: doves" in doves


def test_a_table_of_equal_slices_puts_no_unequal_ones_on_two_levels() -> None:
    world: Any = SimpleNamespace(
        size=lambda _axis: 4, rank=lambda _axis: 1, ranks=lambda _axis: range(4)
    )
    job: Any = SimpleNamespace(mesh=world, rank=1)
    rows = torch.empty(4, 2)
    equal = Collective(Kind.ALL_TO_ALL, (rows, rows.clone()), "data", TAG)
    unequal = replace(equal, input_splits=(2, 0, 1, 1), output_splits=(0, 1, 0, 3))

    def routes(best: str, *rules: Rule) -> list[str]:
        router = Router(world, job, RoutesSection(rules=list(rules)), HOSTS["blocks"])
        router.table = Table({}, {("all_to_all", Shape(4, 2)): [(0, best)]})
        return [router.route_of(equal), router.route_of(unequal)]

    assert routes("two_levels") == ["two_levels", "job"]
    assert routes("gloo") == ["gloo", "gloo"]
    rule = Rule(collective="all_to_all", route="two_levels")
    assert routes("gloo", rule) == ["two_levels", "two_levels"]


def not_here(route: str, others: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        open_job(others, rules=[{"route": route}])
    return str(caught.value)


@pytest.mark.parametrize(
    ("route", "why"),
    [
        ("nccl", "NCCL moves tensors of GPUs, and this job is on cpu"),
        ("mpi", "mpi4py cannot be used|MPI knows of 1 ranks and the job has 2"),
    ],
)
def test_a_route_that_does_not_exist_here_is_refused_on_every_rank(route: str, why: str) -> None:
    for message in run_distributed(not_here, 2, route, {}):
        assert f"communication.routes: there is no route '{route}' here: " in message
        assert re.search(why, message)


def on_one_rank_only() -> list[Any]:
    """What a job says of MPI where rank 1 lacks it, and whether rank 0 has started it."""
    touched: list[str] = []

    class Library(ModuleType):
        def __getattr__(self, name: str) -> Any:
            touched.append(name)
            raise AttributeError(name)

    with pytest.MonkeyPatch.context() as patch:
        package = ModuleType("mpi4py")
        vars(package)["rc"] = SimpleNamespace(initialize=True)
        lacks = Ranks.current().rank == 1
        patch.setitem(sys.modules, "mpi4py", package)
        patch.setitem(sys.modules, "mpi4py.MPI", None if lacks else Library("mpi4py.MPI"))  # type: ignore[arg-type]
        said = not_here("mpi", {})
        with open_job(hierarchical=False) as job:
            absent = missing(job, job.communicator, ["mpi", "two_levels", "gloo"])
        return [said, absent, [name for name in touched if not name.startswith("__")]]


def test_a_route_of_some_ranks_is_refused_by_all_before_any_starts_it() -> None:
    first, second = run_distributed(on_one_rank_only, 2)
    assert first == second
    said, absent, touched = first
    assert "no route 'mpi' here: on rank 1 of 2, mpi4py cannot be used" in said
    assert list(absent) == ["mpi"]
    assert touched == []


def test_what_a_library_raises_as_it_starts_is_told_and_leaves_no_rank_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(_level: int) -> None:
        raise ArithmeticError("MPI_ERR_OTHER: known error not in list")

    package = ModuleType("mpi4py")
    vars(package)["rc"] = SimpleNamespace(initialize=True)
    library = SimpleNamespace(Is_initialized=bool, Init_thread=fail, THREAD_MULTIPLE=3)
    monkeypatch.setitem(sys.modules, "mpi4py", package)
    monkeypatch.setitem(sys.modules, "mpi4py.MPI", library)  # type: ignore[arg-type]
    with open_job(hierarchical=False) as job:
        found = missing(job, job.communicator, ["mpi"])
    assert found == {"mpi": "ArithmeticError: MPI_ERR_OTHER: known error not in list"}


def through_the_host() -> list[bool]:
    """A device's tensors are copied; here those of the host are, which nothing else would do."""
    with open_job(hierarchical=False) as job:
        comm = ThroughHost(job.communicator, always=True)
        size, rank, found = job.world_size, job.rank, []
        for turn, kind in enumerate(KINDS):
            handle, is_right = one(comm, rank, kind, "world", list(range(size)), 64, turn)
            handle.wait()
            found.append(is_right())
        return found


def test_tensors_of_devices_travel_through_the_host() -> None:
    assert run_distributed(through_the_host, 2) == [[True] * len(KINDS)] * 2


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"route": "carrier pigeon"}, "route"),
        ({"route": "gloo", "axis": "no such"}, r"rules\[0\].axis"),
        ({"route": "gloo", "at_least_bytes": 10, "below_bytes": 10}, "so no size fits"),
        ({"route": "gloo", "operation": "all_reduce"}, "operation"),
    ],
)
def test_wrong_rules_are_refused(rule: dict[str, Any], message: str) -> None:
    config = {"train_batch_size": 4, "communication": {"routes": {"rules": [rule]}}}
    with pytest.raises(ConfigError, match=message):
        Plan.build(config, world_size=4)


@pytest.mark.skipif(
    shutil.which("mpirun") is None or find_spec("mpi4py") is None,
    reason="needs mpirun and mpi4py",
)
def test_mpi_carries_collectives_among_those_of_other_routes() -> None:
    script = Path(__file__).with_name("interleaved.py")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    launcher = ["mpirun", "--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-n", "4"]
    done = subprocess.run(
        [*launcher, sys.executable, str(script), "80"],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = sorted(line for line in done.stdout.splitlines() if line.startswith("rank"))
    routes = ["gloo", "job", "mpi", "two_levels"]
    assert lines == [f"rank {rank}: [] by {routes}" for rank in range(4)]
