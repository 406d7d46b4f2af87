"""What shared-memory collectives do when ranks disagree, die or leave, and when memory is short."""

from __future__ import annotations

import ast
import contextlib
import gc
import os
import resource
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from drivetrain_cpu import shared_memory
from drivetrain_cpu.shared_memory import native_library, share_memory
from shared_memory_world import TAG, start

from drivetrain.communication.byte_log import ByteLog
from drivetrain.communication.failure import broken
from drivetrain.communication.mesh import Mesh
from drivetrain.communication.torch_communicator import TorchCommunicator
from drivetrain.contracts import CommunicatorPhase, Purpose
from drivetrain.errors import BuildError, CommunicationError
from drivetrain.job.job import Job
from drivetrain.plan.mesh_layout import MeshLayout
from drivetrain.plan.plan import Plan
from drivetrain.testing import RanksFailedError, run_distributed


@pytest.fixture(scope="module", autouse=True)
def built():
    """Ranks find the kernels in the cache instead of building them all at once."""
    native_library()


# -- faults --------------------------------------------------------------------------------------


def disagreement():
    c = start()
    c.barrier("data", TAG)
    count = 5 + c.rank("data")
    expected = (
        r"all_reduce of gradient/bucket0/backward over 'data' failed: rank [01] is in another"
    )
    with pytest.raises(CommunicationError, match=expected):
        c.all_reduce(torch.ones(count), "data", TAG)
    # Out of step for good: it must not hang or give wrong sums later.
    with pytest.raises(CommunicationError, match="is in another collective"):
        c.all_reduce(torch.ones(3), "data", TAG)
    c.close()


def test_ranks_that_disagree_are_told():
    run_distributed(disagreement, 2)


def stops_waiting():
    """Rank 0 asks twice while it waits for rank 1, which does not come."""
    asked = []
    c = start(broken_off=lambda: asked.append(None) or len(asked) == 2)
    c.barrier("data", TAG)
    store = dist.distributed_c10d._get_default_store()
    if c.rank("data") == 0:
        with pytest.raises(CommunicationError, match="did not come before the job was broken off"):
            c.all_reduce(torch.ones(3), "data", TAG)
        store.set("raised", "")
    else:
        store.wait(["raised"])
    c.close()
    return len(asked)


def test_a_rank_that_waits_for_long_asks_if_it_should():
    assert run_distributed(stops_waiting, 2) == [2, 0]


def closes_amid():
    """Rank 0 waits for rank 1 on its thread, with more behind, and closes."""
    c = start()
    c.barrier("data", TAG)
    line = c._line("data")
    if c.rank("data") == 0:
        handles = [c.all_reduce(torch.ones(9), "data", TAG, asynchronous=True) for _ in range(3)]
        while not handles[0]._future.running():
            time.sleep(0.001)
        c.close()
        assert line.group._group is not None, "released under a collective"
        for handle, why in zip(handles, ["rank 1 left", "was closed", "was closed"], strict=True):
            with pytest.raises(CommunicationError, match=why):
                handle.wait()
        line._thread.shutdown(wait=True)
    else:
        time.sleep(0.5)
        c.close()
    assert line.group._group is None


def test_closing_leaves_a_collective_under_way_its_memory():
    run_distributed(closes_amid, 2)


def wrong_splits():
    c = start()
    rank = c.rank("data")
    # Rank 1 sends two rows, of which rank 0 expects one.
    sent, expected = ([1, 2], [1, 1]) if rank == 0 else ([2, 1], [2, 1])
    splits = {"input_splits": sent, "output_splits": expected}
    message = "rank 1 is in another collective" if rank == 0 else "rank 0 left the job"
    with pytest.raises(CommunicationError, match=message):  # noqa: PT012 - either may raise
        c.all_to_all(torch.empty(sum(expected)), torch.ones(3), "data", TAG, **splits)
        c.barrier("data", TAG)
    c.close()


def test_splits_that_do_not_match_are_told():
    run_distributed(wrong_splits, 2)


def time_of_death(folder):
    """Called by the rank that dies: tells the others when, and is gone."""
    (Path(folder) / "death").write_text(str(time.monotonic()))
    os.kill(os.getpid(), signal.SIGKILL)


def survives(c, collective, folder):
    """Runs ``collective`` until it fails; says with what, how late, and what is left."""
    with pytest.raises(CommunicationError) as caught:  # noqa: PT012 - one of many fails
        while True:
            collective()
    late = time.monotonic() - float((Path(folder) / "death").read_text())
    c.close()
    return str(caught.value), late


def dies_before(folder):
    c = start()
    c.barrier("data", TAG)
    if c.rank("data") == 1:
        time_of_death(folder)
    tensor = torch.ones(100_000)
    raise RuntimeError(survives(c, lambda: c.all_reduce(tensor, "data", TAG), folder))


def dies_within(folder, registered):
    found = moves_until_death(folder, registered)
    gc.collect()
    # What the dead rank shared is freed with its last mapping.
    raise RuntimeError((*found, "memfd:drivetrain" in Path("/proc/self/maps").read_text()))


def moves_until_death(folder, registered):
    """Rank 1 dies while a thread of its process is moving data."""
    c = start()
    count = 4_000_000
    tensor = c.buffer(count, torch.float32, "data") if registered else torch.zeros(count)
    assert "/dev/shm" not in Path("/proc/self/maps").read_text()
    if c.rank("data") == 1:
        handles = [c.all_reduce(tensor, "data", TAG, asynchronous=True) for _ in range(2000)]
        time.sleep(0.2)
        assert not handles[-1]._future.done()
        time_of_death(folder)
    return survives(c, lambda: c.all_reduce(tensor, "data", TAG), folder)


def assert_named_soon(error, *left):
    message, late, *rest = ast.literal_eval(error.removeprefix("RuntimeError: "))
    assert message.endswith("over 'data' failed: rank 1 died")
    assert late < 30  # not the minute after which a rank that does not come is lost
    assert rest == list(left)


def test_a_rank_that_is_killed_makes_the_others_fail_with_its_name(tmp_path):
    with pytest.raises(RanksFailedError) as caught:
        run_distributed(dies_before, 3, str(tmp_path))
    for rank in (0, 2):
        assert_named_soon(caught.value.errors[rank].error)


@pytest.mark.parametrize("registered", [False, True])
def test_a_rank_that_is_killed_within_a_collective_leaves_nothing(tmp_path, registered):
    with pytest.raises(RanksFailedError) as caught:
        run_distributed(dies_within, 3, str(tmp_path), registered)
    for rank in (0, 2):
        assert_named_soon(caught.value.errors[rank].error, False)


def dies_in_a_job():
    """What memory carries and what it does not: integers go by gloo."""
    job = Job.open(Plan.build({}, world_size=3, batch_required=False))
    for dtype in (torch.float32, torch.int64):
        job.communicator.all_reduce(torch.ones(9, dtype=dtype), "world", TAG)
    if job.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    found = []
    for dtype in (torch.float32, torch.int64):
        with pytest.raises(CommunicationError) as caught:
            job.communicator.all_reduce(torch.ones(9, dtype=dtype), "world", TAG)
        found.append(str(caught.value))
    raise RuntimeError(found)


def test_a_rank_that_is_killed_is_named_whatever_carries_the_data():
    with pytest.raises(RanksFailedError) as caught:
        run_distributed(dies_in_a_job, 3)
    for rank in (0, 2):
        found = ast.literal_eval(caught.value.errors[rank].error.removeprefix("RuntimeError: "))
        assert len(found) == 2
        for message in found:
            assert "was broken off because rank 1 died without an error of its own" in message


def leaves():
    c = start()
    c.barrier("data", TAG)
    if c.rank("data") == 1:
        c.close()
        return
    with pytest.raises(CommunicationError, match="rank 1 left the job"):
        c.all_reduce(torch.ones(100_000), "data", TAG)
    c.close()


def test_a_rank_that_leaves_makes_the_others_fail_with_its_name():
    run_distributed(leaves, 3)


def dawdles():
    c = start(timeout=0.3)
    assert c.joined_page("data") > 0  # memory is shared from here on; nobody was waited for in it
    if c.rank("data") == 0:
        with pytest.raises(CommunicationError, match="rank 1 did not come in time"):
            c.barrier("data", TAG)
        Path(os.environ["SIGN"]).touch()
    else:
        while not Path(os.environ["SIGN"]).exists():
            time.sleep(0.02)
    c.close()


def test_a_rank_that_does_not_come_is_named(tmp_path):
    run_distributed(dawdles, 2, env={"SIGN": str(tmp_path / "sign")})


def closes_while_waiting():
    c = start()
    c.barrier("data", TAG)
    if c.rank("data") == 0:
        handle = c.all_reduce(torch.ones(9), "data", TAG, asynchronous=True)
        time.sleep(0.1)
        with pytest.raises(CommunicationError, match="rank 1 left the job"):
            handle.wait()
    else:
        time.sleep(0.2)
    c.close()


def test_a_collective_under_way_fails_when_a_rank_leaves():
    run_distributed(closes_while_waiting, 2)


# -- memory --------------------------------------------------------------------------------------


@contextlib.contextmanager
def segments_up_to(size):
    """On rank 1, the system refuses segments beyond ``size`` bytes; answers what rank 0 says."""
    limit = resource.RLIMIT_FSIZE
    soft, hard = resource.getrlimit(limit)
    if os.environ["RANK"] == "1":
        resource.setrlimit(limit, (size, hard))
    said = []
    shared_memory.logger.warning = lambda message, *rest: said.append(message % rest)
    try:
        yield said
    finally:
        del shared_memory.logger.warning
        resource.setrlimit(limit, (soft, hard))


def without_memory():
    with segments_up_to(1000) as said:
        c = start()
        tensor = torch.ones(5)
        c.all_reduce(tensor, "data", TAG)
        c.all_reduce(tensor, "data", TAG)
        assert torch.equal(tensor, torch.full((5,), 4.0))
        assert c.inner.carried == ["all_reduce"] * 2
        assert c.buffer(5, torch.float32, "data").tolist() == [0.0] * 5
        c.close()
    return said


def test_without_memory_on_one_rank_all_fall_back_with_one_line():
    said = run_distributed(without_memory, 2)
    assert [len(lines) for lines in said] == [1, 0]
    assert said[0][0].startswith("axis 'data' does not communicate through memory: ")


def without_memory_for_buffers():
    with segments_up_to(100_000) as said:
        c = start()
        for _ in range(3):
            tensor = c.buffer(50_000, torch.float32, "data").fill_(1)
            c.all_reduce(tensor, "data", TAG)
            assert torch.equal(tensor, torch.full((50_000,), 2.0))
        assert c.buffer(1000, torch.float32, "data").tolist() == [0.0] * 1000
        assert c.inner.carried == []
        c.close()
    return said


def test_buffers_that_do_not_fit_are_ordinary_memory_with_one_line():
    said = run_distributed(without_memory_for_buffers, 2)
    assert said == [
        ["buffers over axis 'data' are in ordinary memory: another rank cannot share memory"],
        [],
    ]


def buffers_of_different_sizes():
    c = start()
    with segments_up_to(resource.RLIM_INFINITY) as said:
        rank = c.rank("data")
        assert c.buffer(5000 * (rank + 1), torch.float32, "data").numel() == 5000 * (rank + 1)
        c.barrier("data", TAG)
    c.close()
    return said


def test_buffers_of_different_sizes_are_ordinary_memory():
    first, _ = run_distributed(buffers_of_different_sizes, 2)
    assert first == [
        "buffers over axis 'data' are in ordinary memory: its ranks ask for different sizes"
    ]


def failing_library():
    raise BuildError("no C++ compiler found")


def without_compiler():
    library = failing_library if os.environ["RANK"] == "0" else native_library
    c = start(library=library)
    tensor = torch.ones(5)
    c.all_reduce(tensor, "data", TAG)
    assert torch.equal(tensor, torch.full((5,), 2.0))
    assert c.inner.carried == ["all_reduce"]
    c.close()


def test_without_kernels_on_one_rank_all_fall_back():
    run_distributed(without_compiler, 2)


def buffers_come_and_go():
    c = start()

    def mapped():
        return Path("/proc/self/maps").read_text().count("memfd:drivetrain")

    c.barrier("data", TAG)
    before = mapped()
    for _ in range(3):
        buffer = c.buffer(1_000_000, torch.float32, "data")
        view = buffer[10:20].view(2, 5)
        del buffer
        assert mapped() == before + 2
        assert float(view.sum()) == 0.0
        del view
        gc.collect()
        assert mapped() == before
    c.close()
    del c
    gc.collect()
    assert mapped() == 0


def test_buffers_are_unmapped_with_their_last_view():
    run_distributed(buffers_come_and_go, 2)


# -- as a layer of a job -------------------------------------------------------------------------


def inside_a_job():
    dist.init_process_group("gloo")
    mesh = Mesh(MeshLayout.build(dist.get_world_size(), ()), dist.get_rank())
    closers = []
    job = SimpleNamespace(
        device=torch.device("cpu"),
        world_size=dist.get_world_size(),
        mesh=mesh,
        rank=dist.get_rank(),
        failures=None,
        on_close=closers.append,
        explain=broken,
    )
    (layer,) = share_memory(job)
    assert layer.phase is CommunicatorPhase.ROUTE
    assert layer.phase < CommunicatorPhase.BYTE_LOG
    communicator = log = ByteLog(layer.wrap(TorchCommunicator(mesh, torch.device("cpu"))))
    communicator.all_reduce(torch.ones(1000), "data", TAG)
    assert log.total(Purpose.GRADIENT).payload_bytes == 4000
    assert log.total(Purpose.CONTROL).payload_bytes == 0
    assert "memfd:drivetrain" in Path("/proc/self/maps").read_text()
    (close,) = closers
    close()
    with pytest.raises(CommunicationError, match="is closed"):
        communicator.all_reduce(torch.ones(1000), "data", TAG)


def test_a_job_counts_what_goes_through_memory_and_leaves_when_it_closes():
    run_distributed(inside_a_job, 2)


def test_a_job_of_one_rank_or_on_another_device_shares_nothing():
    one = SimpleNamespace(device=torch.device("cpu"), world_size=1)
    other = SimpleNamespace(device=torch.device("meta"), world_size=2)
    assert list(share_memory(one)) == []
    assert list(share_memory(other)) == []
