"""Started collectives through shared memory, beside messages that go around it."""

from __future__ import annotations

import pytest
import torch
from shared_memory_world import start

from drivetrain.communication.byte_log import ByteLog
from drivetrain.communication.functional import functional
from drivetrain.contracts import Purpose, Tag
from drivetrain.testing import run_distributed

TAG = Tag(Purpose.ACTIVATION, site="test")


def moved() -> None:
    routed = start()
    c = ByteLog(routed)
    f = functional(c, "data", TAG)
    generator = torch.Generator().manual_seed(0)
    everyone = [
        torch.randn(2 * f.size, 3, dtype=torch.float64, generator=generator).requires_grad_()
        for _ in range(f.size)
    ]
    gathered = torch.cat(everyone).sin()
    scattered = sum(everyone).chunk(f.size)
    swapped = [torch.cat([x.chunk(f.size)[r] for x in everyone]) for r in range(f.size)]
    losses = [
        (gathered.cos() * (r + 1)).sum() + (scattered[r] ** 3).sum() + (swapped[r] ** 3).sum()
        for r in range(f.size)
    ]
    firsts = torch.autograd.grad(sum(losses), everyone, create_graph=True)
    seconds = torch.autograd.grad(sum((g**2).sum() for g in firsts), everyone)

    x = everyone[f.rank].detach().float().requires_grad_()
    gathering, scattering = f.start("all_gather", x), f.start("reduce_scatter", x)
    counts = f.counts(torch.full((f.size,), 2), len(x))
    swapping = f.start_exchange(x, counts.received, counts.sent)
    coming = torch.empty(3)
    ring = c.send_receive(
        [(x.detach()[0].clone(), (f.rank + 1) % f.size)],
        [(coming, (f.rank - 1) % f.size)],
        "data", TAG, asynchronous=True,
    )  # fmt: skip
    loss = (gathering.wait().sin().cos() * (f.rank + 1)).sum()
    loss = loss + (scattering.wait() ** 3).sum() + (swapping.wait() ** 3).sum()
    ring.wait()
    assert torch.equal(coming, everyone[f.rank - 1][0].float())
    assert torch.allclose(loss.double(), losses[f.rank], rtol=1e-5)
    (first,) = torch.autograd.grad(loss, x, create_graph=True)
    (second,) = torch.autograd.grad((first**2).sum(), x)
    assert torch.allclose(first.double(), firsts[f.rank], rtol=1e-4, atol=1e-4)
    assert torch.allclose(second.double(), seconds[f.rank], rtol=1e-4, atol=1e-3)
    nbytes = 2 * f.size * 3 * 4
    assert c.total(op="send_receive").sent_bytes == 12
    assert c.total(op="all_to_all", purpose=Purpose.ACTIVATION).sent_bytes == (
        4 * nbytes * (f.size - 1) / f.size
    )
    # One gather in forward, the other's adjoint in backward, and both to differentiate that.
    assert c.total(op="all_gather").sent_bytes == 2 * nbytes * (f.size - 1) * (1 + 1 / f.size)
    assert not routed.inner.carried
    routed.close()


@pytest.mark.parametrize("world", [2, 4])
def test_started_collectives_agree_with_one_process_through_memory(world):
    run_distributed(moved, world)
