"""Memory of other ranks, read where it lies: settled gathers and joined buffers."""

from __future__ import annotations

import gc
import time

import pytest
import torch
from drivetrain_cpu.shared_memory import native_library
from shared_memory_world import TAG, start, values

from drivetrain.contracts import Kind
from drivetrain.testing import run_distributed


@pytest.fixture(scope="module", autouse=True)
def built():
    """Ranks find the kernels in the cache instead of building them all at once."""
    native_library()


def lonely_gather():
    c = start()
    size, rank = c.size("data"), c.rank("data")
    shard = c.buffer(1001, torch.float32, "data")
    shard.copy_(values(rank, torch.float32, 1001))
    assert c.reads_settled(shard, "data")
    assert not c.reads_settled(torch.empty(8), "data")
    c.barrier("data", TAG)
    if rank == 0:  # nobody else takes part
        whole = torch.empty(size * 1001)
        c.all_gather(whole, shard, "data", TAG, settled=True)
        everyone = torch.cat([values(r, torch.float32, 1001) for r in range(size)])
        assert torch.equal(whole, everyone)
    c.barrier("data", TAG)
    c.close()


@pytest.mark.parametrize("world", [2, 3])
def test_a_settled_gather_needs_no_other_rank(world):
    run_distributed(lonely_gather, world)


def settled_in_ordinary_memory():
    c = start()
    size, rank = c.size("data"), c.rank("data")
    shard, whole = values(rank, torch.bfloat16, 100), torch.empty(size * 100, dtype=torch.bfloat16)
    c.all_gather(whole, shard, "data", TAG, settled=True)
    everyone = torch.cat([values(r, torch.bfloat16, 100) for r in range(size)])
    assert torch.equal(whole, everyone)
    c.close()


def test_settled_values_in_ordinary_memory_are_gathered_together():
    run_distributed(settled_in_ordinary_memory, 2)


def joined():
    c = start()
    size, rank = c.size("data"), c.rank("data")
    page = c.joined_page("data")
    numel = 3 * page // 4
    row = c.joined_buffer(numel, torch.float32, "data")
    assert row.shape == (size * numel,)
    assert not row.any()
    c.barrier("data", TAG)
    mine = row.narrow(0, rank * numel, numel)
    mine.copy_(values(rank, torch.float32, numel))
    c.barrier("data", TAG)
    everyone = torch.stack([values(r, torch.float32, numel) for r in range(size)])
    assert torch.equal(row.view(size, numel), everyone)
    c.barrier("data", TAG)
    # A slice of it is registered memory like any other.
    before = c.inner.carried.count(Kind.REDUCE_SCATTER)
    c.reduce_scatter(mine, everyone.reshape(-1).clone(), "data", TAG)
    assert torch.equal(mine, size * everyone[rank])
    assert c.inner.carried.count(Kind.REDUCE_SCATTER) == before
    del mine, row
    gc.collect()
    c.barrier("data", TAG)
    c.close()


@pytest.mark.parametrize("world", [2, 3, 4])
def test_a_joined_buffer_shows_every_ranks_part_at_once(world):
    run_distributed(joined, world)


def mapped_mebibytes():
    c = start()
    rss = []
    for _ in range(30):
        c.joined_buffer(2**20, torch.float32, "data").fill_(c.rank("data"))
        gc.collect()
        time.sleep(0)
        with open("/proc/self/statm") as statm:  # noqa: PTH123 - no path of ours
            rss.append(int(statm.read().split()[1]) * 4096 >> 20)
    c.close()
    return max(rss) - rss[0]


def test_joined_buffers_that_nobody_holds_are_unmapped():
    assert max(run_distributed(mapped_mebibytes, 2)) <= 16
