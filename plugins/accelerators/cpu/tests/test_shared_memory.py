"""Shared-memory collectives against sums and copies that each rank works out for itself."""

from __future__ import annotations

import gc

import pytest
import torch
from drivetrain_cpu.shared_memory import native_library
from shared_memory_world import TAG, start, values

from drivetrain.contracts import Op
from drivetrain.errors import CommunicationError
from drivetrain.testing import run_distributed

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)
WORLDS = (2, 3, 4)
SIZES = (1, 7, 1000, 50_001)


@pytest.fixture(scope="module", autouse=True)
def built():
    """Ranks find the kernels in the cache instead of building them all at once."""
    native_library()


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
        for memory in memories(c, size * rows * 3, torch.float32):
            memory.copy_(torch.cat(sent).flatten())
            output = torch.empty(size * rows, 3)
            c.all_to_all(output, memory.view(-1, 3), "data", TAG)
            assert_equal(output, torch.cat(expected), f"even {rows}")
        mine = torch.cat([message(rank, k, rows) for k in range(size)])
        others = [rows_between(k, rank, rows) for k in range(size)]
        most = max(sum(rows_between(k, r, rows) for r in range(size)) for k in range(size))
        for memory in memories(c, most, torch.bfloat16):
            memory[: len(mine)].copy_(mine)
            output = torch.empty(sum(others), dtype=torch.bfloat16)
            c.all_to_all(
                output,
                memory[: len(mine)],
                "data",
                TAG,
                output_splits=others,
                input_splits=[rows_between(rank, k, rows) for k in range(size)],
            )
            arrived = torch.cat([message(k, rank, rows) for k in range(size)])
            assert_equal(output, arrived, f"uneven {rows}")
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
        output = torch.empty(3 * numel)
        source = c.buffer(3 * numel, torch.float32, "data")
        # Only some have registered what they send.
        source = source if (rank + turn) % 3 else torch.empty(3 * numel)
        source.fill_(rank)
        c.all_to_all(output, source, "data", TAG)
        assert torch.equal(output, torch.arange(3.0).repeat_interleave(numel))
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
