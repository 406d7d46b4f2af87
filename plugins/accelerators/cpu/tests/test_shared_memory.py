"""Shared-memory collectives against sums and copies that each rank works out for itself."""

from __future__ import annotations

import gc
import os
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from drivetrain_cpu import shared_group, shared_memory, shared_segment
from drivetrain_cpu.shared_memory import SharedMemoryCommunicator, native_library

from drivetrain.communicator import Op, Purpose, Tag
from drivetrain.errors import BuildError, CommunicationError
from drivetrain.mesh import Mesh
from drivetrain.mesh_layout import MeshLayout
from drivetrain.testing import RanksFailedError, run_distributed
from drivetrain.torch_communicator import TorchCommunicator

TAG = Tag(Purpose.GRADIENT, "bucket0", "backward")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)
WORLDS = (2, 3, 4)
# Small slots, so that small tensors take many turns.
SLOT = 24 * 1024
SIZES = (1, 7, 1000, 50_001)


@pytest.fixture(scope="module", autouse=True)
def built():
    """Ranks find the kernels in the cache instead of building them all at once."""
    native_library()


class Counting(TorchCommunicator):
    """Counts what is not routed through memory."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.carried = []

    def _run(self, what, line, tag, asynchronous):
        if tag is not shared_group.SETUP:
            self.carried.append(what)
        return super()._run(what, line, tag, asynchronous)


def start(slot=SLOT, timeout=60.0, library=native_library):
    shared_group.SLOT_BYTES = slot
    dist.init_process_group("gloo")
    mesh = Mesh(MeshLayout.build(dist.get_world_size(), ()), dist.get_rank())
    inner = Counting(mesh, torch.device("cpu"))
    return SharedMemoryCommunicator(inner, library, mesh.ranks, timeout)


def values(rank, dtype, numel):
    """Small whole numbers, exact in every dtype and in every sum of them."""
    return ((torch.arange(numel) * 7 + 3 * rank) % 11).to(dtype)


def assert_equal(actual, expected, message):
    assert actual.dtype == expected.dtype, message
    assert torch.equal(actual, expected), message


def memories(c, numel, dtype):
    """Ordinary memory, unaligned memory and registered memory of ``numel`` elements."""
    yield torch.empty(numel, dtype=dtype)
    yield torch.empty(numel + 1, dtype=dtype)[1:]
    yield c.buffer(numel, dtype, "data")
    yield c.buffer(numel + 3, dtype, "data")[3:]


def reductions(dtype):
    c = start()
    size, rank = c.size("data"), c.rank("data")
    results = {Op.SUM: lambda x: x.sum(0), Op.MAX: lambda x: x.amax(0), Op.MIN: lambda x: x.amin(0)}
    for part in SIZES:
        numel = part * size
        everyone = torch.stack([values(r, dtype, numel) for r in range(size)]).int()
        for op, result in results.items():
            expected = result(everyone).to(dtype)
            slice_ = slice(rank * part, (rank + 1) * part)
            for memory in memories(c, numel, dtype):
                memory.copy_(values(rank, dtype, numel))
                c.all_reduce(memory, "data", TAG, op=op)
                assert_equal(memory, expected, f"all-reduce {op} {numel}")
                memory.copy_(values(rank, dtype, numel))
                out = torch.empty(part, dtype=dtype)
                c.reduce_scatter(out, memory, "data", TAG, op=op)
                assert_equal(out, expected[slice_], f"reduce-scatter {op} {numel}")
                assert_equal(memory, values(rank, dtype, numel), "the input was changed")
                c.reduce_scatter(memory[slice_], memory, "data", TAG, op=op)
                assert_equal(memory[slice_], expected[slice_], "in place")
    assert c.inner.carried == []
    c.close()


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reductions_are_those_of_all_ranks(world, dtype):
    run_distributed(reductions, world, dtype)


def movements():
    c = start()
    size, rank = c.size("data"), c.rank("data")
    for dtype in (torch.float32, torch.int8, torch.int64, torch.bool):
        for part in SIZES:
            pieces = [values(r, dtype, part) for r in range(size)]
            for whole in memories(c, part * size, dtype):
                c.all_gather(whole, pieces[rank], "data", TAG)
                assert_equal(whole, torch.cat(pieces), f"all-gather {part}")
                whole.zero_()
                mine = whole[rank * part : (rank + 1) * part]
                mine.copy_(pieces[rank])
                c.all_gather(whole, mine, "data", TAG)
                assert_equal(whole, torch.cat(pieces), f"all-gather in place {part}")
            for source in range(size):
                for memory in memories(c, part, dtype):
                    memory.copy_(pieces[rank])
                    c.broadcast(memory, "data", TAG, source=source)
                    assert_equal(memory, pieces[source], f"broadcast {part} from {source}")
    c.barrier("data", TAG)
    assert c.inner.carried == []
    c.close()


@pytest.mark.parametrize("world", WORLDS)
def test_moved_data_arrives(world):
    run_distributed(movements, world)


def rows_between(sender, receiver, rows):
    """Different for every pair, and none from a rank to itself."""
    return 0 if sender == receiver else (sender + 2 * receiver) * rows // 2


def message(sender, receiver, rows):
    return values(sender + 5 * receiver, torch.bfloat16, rows_between(sender, receiver, rows))


def exchanges():
    c = start()
    size, rank = c.size("data"), c.rank("data")
    for rows in (1, 40, 5000):
        sent = [values(10 * rank + k, torch.float32, rows * 3).view(rows, 3) for k in range(size)]
        expected = [
            values(10 * k + rank, torch.float32, rows * 3).view(rows, 3) for k in range(size)
        ]
        output = torch.empty(size * rows, 3)
        c.all_to_all(output, torch.cat(sent), "data", TAG)
        assert_equal(output, torch.cat(expected), f"even {rows}")
        others = [rows_between(k, rank, rows) for k in range(size)]
        output = torch.empty(sum(others), dtype=torch.bfloat16)
        c.all_to_all(
            output,
            torch.cat([message(rank, k, rows) for k in range(size)]),
            "data",
            TAG,
            output_splits=others,
            input_splits=[rows_between(rank, k, rows) for k in range(size)],
        )
        assert_equal(output, torch.cat([message(k, rank, rows) for k in range(size)]), "uneven")
    assert c.inner.carried == []
    c.close()


@pytest.mark.parametrize("world", WORLDS)
def test_exchanged_slices_arrive(world):
    run_distributed(exchanges, world)


def mixed_memory():
    """Only some ranks use registered memory, and one has let go of a buffer."""
    c = start()
    rank, numel = c.rank("data"), 20_000
    for turn in range(3):
        buffer = c.buffer(numel, torch.float32, "data")
        memory = buffer if (rank + turn) % 2 else torch.empty(numel)
        if rank == turn:
            del buffer
            gc.collect()
        memory.fill_(rank + 1)
        c.all_reduce(memory, "data", TAG)
        assert torch.equal(memory, torch.full((numel,), 6.0))
        whole = c.buffer(3 * numel, torch.float32, "data") if rank else torch.empty(3 * numel)
        if not rank:
            c.buffer(3 * numel, torch.float32, "data")
        c.all_gather(whole, memory, "data", TAG)
        assert torch.equal(whole, torch.full((3 * numel,), 6.0))
    c.close()


def test_ranks_may_use_different_kinds_of_memory():
    run_distributed(mixed_memory, 3)


def low_precision():
    c = start()
    rank = c.rank("data")
    # 256 + 1 + 1 is 258 in float32; in bfloat16, whose step is 2 there, each 1 would be lost.
    for numel in (16, 40_000):
        tensor = torch.full((numel,), [256.0, 1.0, 1.0][rank], dtype=torch.bfloat16)
        c.all_reduce(tensor, "data", TAG)
        assert torch.equal(tensor, torch.full((numel,), 258.0, dtype=torch.bfloat16))
    c.close()


def test_low_precision_is_summed_in_float32():
    run_distributed(low_precision, 3)


def random_sums():
    c = start()
    generator = torch.Generator().manual_seed(c.rank("data"))
    found = []
    for numel in (100, 40_000):
        for memory in (torch.empty(numel), c.buffer(numel, torch.float32, "data")):
            memory.copy_(torch.randn(numel, generator=generator))
            c.all_reduce(memory, "data", TAG)
            found.append(memory.clone())
    c.close()
    return found


def test_all_ranks_get_the_same_bits():
    first, *others = run_distributed(random_sums, 4)
    for other in others:
        for one, same in zip(first, other, strict=True):
            assert torch.equal(one, same)


def interleaved():
    """Asynchronous collectives over two axes, issued in different order by the ranks."""
    c = start()
    mesh = c.inner._mesh
    both, pair = "data", mesh.subgroup("data", (0, 1))
    rank = c.rank("data")
    c.barrier(both, TAG)
    c.barrier(pair, TAG)
    for _ in range(20):
        one, other = torch.full((9000,), rank + 1.0), torch.full((9000,), rank + 1.0)
        order = [(one, both), (other, pair)]
        handles = [
            c.all_reduce(tensor, axis, TAG, asynchronous=True)
            for tensor, axis in (order if rank else reversed(order))
        ]
        small = torch.ones(3)
        c.all_reduce(small, both, TAG)  # follows those under way
        for handle in handles:
            handle.wait()
            handle.wait()
        assert torch.equal(one, torch.full((9000,), 3.0))
        assert torch.equal(other, torch.full((9000,), 3.0))
        assert torch.equal(small, torch.full((3,), 2.0))
    c.close()


def test_axes_may_be_interleaved_differently():
    run_distributed(interleaved, 2)


def subgroups():
    c = start()
    mesh, rank = c.inner._mesh, c.rank("data")
    axis = mesh.subgroup("data", (0, 2) if rank % 2 == 0 else (1, 3))
    tensor = torch.full((30_000,), float(rank))
    c.all_reduce(tensor, axis, TAG)
    assert torch.equal(tensor, torch.full((30_000,), 2.0 if rank % 2 == 0 else 4.0))
    assert c.inner.carried == []
    c.close()


def test_any_group_shares_memory():
    run_distributed(subgroups, 4)


def others_are_carried():
    c = start()
    size = c.size("data")
    tensor = torch.ones(4, dtype=torch.float64)
    c.all_reduce(tensor, "data", TAG)
    assert torch.equal(tensor, torch.full((4,), float(size), dtype=torch.float64))
    assert c.inner.carried == ["all_reduce"]
    with pytest.raises(CommunicationError, match="is not contiguous"):
        c.all_reduce(torch.ones(4, 4).t(), "data", TAG)
    with pytest.raises(CommunicationError, match="do not fit: expected 2 ranks x 3"):
        c.all_gather(torch.ones(5), torch.ones(3), "data", TAG)
    with pytest.raises(CommunicationError, match="no position 5 among 2 ranks"):
        c.broadcast(torch.ones(5), "data", TAG, source=5)
    with pytest.raises(CommunicationError, match="cannot be cut into"):
        c.all_to_all(torch.ones(4), torch.ones(4), "data", TAG, input_splits=[1, 1])
    c.close()


def test_what_memory_does_not_serve_goes_to_gloo_and_is_checked_there():
    run_distributed(others_are_carried, 2)


# -- faults ---------------------------------------------------------------------------------------


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


def dies():
    c = start()
    c.barrier("data", TAG)
    if c.rank("data") == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    began = time.monotonic()
    try:
        c.all_reduce(torch.ones(100_000), "data", TAG)
    except CommunicationError as error:
        raise RuntimeError(f"{error} after {time.monotonic() - began < 5}") from error


def test_a_rank_that_is_killed_makes_the_others_fail_with_its_name():
    with pytest.raises(RanksFailedError) as caught:
        run_distributed(dies, 3)
    for rank in (0, 2):
        found = caught.value.errors[rank].error
        assert "rank 1 died after True" in found, found


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
    c.barrier("data", TAG)
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


# -- memory ---------------------------------------------------------------------------------------


def without_memory(caplog_file):
    real = shared_segment.os.posix_fallocate
    if os.environ["RANK"] == "1":

        def refuse(*arguments):
            raise OSError(28, "No space left on device")

        shared_segment.os.posix_fallocate = refuse
    said = []
    shared_memory.logger.warning = lambda message, *rest: said.append(message % rest)
    try:
        c = start()
        tensor = torch.ones(5)
        c.all_reduce(tensor, "data", TAG)
        c.all_reduce(tensor, "data", TAG)
        assert torch.equal(tensor, torch.full((5,), 4.0))
        assert c.inner.carried == ["all_reduce"] * 2
        assert c.buffer(5, torch.float32, "data").tolist() == [0.0] * 5
        c.close()
    finally:
        shared_segment.os.posix_fallocate = real
        del shared_memory.logger.warning
    return said


def test_without_memory_on_one_rank_all_fall_back_with_one_line():
    said = run_distributed(without_memory, 2, None)
    assert [len(lines) for lines in said] == [1, 0]
    assert said[0][0].startswith("axis 'data' does not communicate through memory: ")


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


def test_nothing_is_left_in_dev_shm():
    def listing():
        return {path.name for path in Path("/dev/shm").iterdir() if "drivetrain" in path.name}

    before = listing()
    with pytest.raises(RanksFailedError):
        run_distributed(dies, 2)
    assert listing() == before
