"""Cores and threads of ranks, on made-up hosts and on this one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from drivetrain_cpu.binding import cores_of, number_of_threads, share, wants_binding
from hypothesis import given
from hypothesis import strategies as st

from drivetrain.errors import ConfigError
from drivetrain.job.job import Job
from drivetrain.plan.plan import Plan
from drivetrain.testing import run_distributed

CORES = len(os.sched_getaffinity(0))


def host(folder: Path, places: dict[int, tuple[int, int]]) -> Path:
    """A topology folder in which CPU n is on the given (socket, core)."""
    for cpu, (socket, core) in places.items():
        topology = folder / f"cpu{cpu}" / "topology"
        topology.mkdir(parents=True)
        (topology / "physical_package_id").write_text(f"{socket}\n")
        (topology / "core_id").write_text(f"{core}\n")
    return folder


def test_hardware_threads_of_a_core_stay_together(tmp_path):
    # Linux numbers the second hardware threads of all cores after the first ones.
    places = {
        0: (0, 0),
        1: (0, 1),
        2: (1, 0),
        3: (1, 1),
        4: (0, 0),
        5: (0, 1),
        6: (1, 0),
        7: (1, 1),
    }
    topology = host(tmp_path, places)
    assert cores_of(range(8), topology) == [(0, 4), (1, 5), (2, 6), (3, 7)]
    assert cores_of([5, 6, 7], topology) == [(5,), (6,), (7,)]


def test_cpus_of_an_unknown_place_are_cores(tmp_path):
    assert cores_of([2, 0, 1], tmp_path) == [(0,), (1,), (2,)]


@given(st.integers(1, 64), st.integers(1, 64))
def test_shares_are_disjoint_even_and_leave_no_core(cores, ranks):
    whole = [(cpu,) for cpu in range(cores)]
    shares = [share(whole, rank, ranks) for rank in range(ranks)]
    assert [core for part in shares for core in part] == whole
    sizes = [len(part) for part in shares]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(
    ("setting", "ranks", "environment", "threads"),
    [
        ("auto", 1, {}, 8),
        ("auto", 3, {}, 2),
        ("auto", 20, {}, 1),
        (5, 2, {"OMP_NUM_THREADS": "3"}, 5),
        ("auto", 2, {"OMP_NUM_THREADS": "3"}, 3),
        ("auto", 2, {"OMP_NUM_THREADS": "1"}, 1),
        ("auto", 2, {"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "none"}, 4),
        ("auto", 2, {"OMP_NUM_THREADS": "3", "TORCHELASTIC_RUN_ID": "none"}, 3),
        ("auto", 2, {"OMP_NUM_THREADS": "4,2"}, 4),
        ("auto", 2, {"OMP_NUM_THREADS": "0"}, 4),
    ],
)
def test_number_of_threads(setting, ranks, environment, threads):
    cores = [(cpu,) for cpu in range(8)]
    assert number_of_threads(setting, cores, ranks, environment) == threads


def test_ranks_are_bound_when_it_helps_or_is_asked_for():
    cores = [(0,), (1,), (2,)]
    assert wants_binding("auto", cores, 3)
    assert not wants_binding("auto", cores, 1)
    assert not wants_binding("auto", cores, 4)
    assert not wants_binding(False, cores, 3)
    assert wants_binding(True, cores, 1)
    with pytest.raises(ConfigError, match=r"bind_cores: true, but 4 ranks share the 3 cores"):
        wants_binding(True, cores, 4)


def where(config: dict[str, object]) -> list[tuple[list[int], int]]:
    """CPUs and threads in two jobs after each other."""
    found = []
    for _ in range(2):
        plan = Plan.build({"accelerator": "cpu", "cpu": config}, batch_required=False)
        with Job.open(plan):
            found.append((sorted(os.sched_getaffinity(0)), torch.get_num_threads()))
    return found


@pytest.mark.skipif(CORES < 2, reason="needs two cores")
def test_ranks_of_a_job_run_on_cores_of_their_own():
    first, second = run_distributed(where, 2, {"threads": 3})
    for bound, other in zip(first, second, strict=True):
        assert set(bound[0]).isdisjoint(other[0])
        assert bound[1] == other[1] == 3
    assert first[0] == first[1], "a second job does not divide the share once more"


def test_unbound_ranks_may_use_all_cores():
    for bound in run_distributed(where, 2, {"bind_cores": False}):
        assert [len(cpus) for cpus, _ in bound] == [CORES, CORES]
        assert [threads for _, threads in bound] == [1, 1]
