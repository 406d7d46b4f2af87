"""Moving what autograd saves, against plain torch; "away" is other host memory here."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from drivetrain_offload.activations.memory import Activation, HostActivation, HostMemory, HostPool
from drivetrain_offload.activations.plugin import ActivationOffload, ActivationOffloadSection
from drivetrain_offload.activations.saved import ActivationOffloader
from drivetrain_offload.host.copies import Reached
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from drivetrain.errors import TrainingError
from drivetrain.job.accelerator_choice import choose_accelerator
from drivetrain.testing import PluginConformance
from drivetrain.testing.models import ConvNet, TinyGPT

LAYERS = 4
CPU = torch.device("cpu")


class TestPlugin(PluginConformance):
    plugin = ActivationOffload
    config = {"activation_offload": {"enabled": True, "min_bytes": 4096}}


def offload(module: nn.Module, **section: Any) -> ActivationOffloader:
    memory = HostMemory(choose_accelerator(), CPU, pin=False)
    given = ActivationOffloadSection(enabled=True, **{"min_bytes": 1, **section})
    return ActivationOffloader(module, memory, given)


def gpt(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(1)
    return TinyGPT(layers=LAYERS, tied=True, dropout=dropout)


def tokens(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    batch = torch.randint(64, (2, 9), generator=generator)
    return batch[:, :-1], batch[:, 1:]


def images() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, 3, 8, 8, generator=generator), torch.tensor([0, 1, 2, 3])


def gradients(module: nn.Module, loss: torch.Tensor) -> list[torch.Tensor]:
    module.zero_grad()
    loss.backward()
    found = [p.grad for p in module.parameters()]
    assert all(g is not None for g in found)
    return found


def equal(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return all(map(torch.equal, ours, theirs))


CHECKPOINTED = {
    "not-reentrant": lambda block, x: checkpoint(block, x, use_reentrant=False),
    "reentrant": lambda block, x: checkpoint(block, x, use_reentrant=True),
}


class Checkpointed(nn.Module):
    """A stack whose blocks are recomputed, from outside or from inside of each block."""

    def __init__(self, how: str, *, inside: bool) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.how, self.inside = CHECKPOINTED[how], inside
        self.first = nn.Linear(8, 32)
        self.blocks = nn.ModuleList(_Inner(self) for _ in range(LAYERS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x) if self.inside else self.how(block, x)
        return x.square().mean()


class _Inner(nn.Module):
    def __init__(self, outer: Checkpointed) -> None:
        super().__init__()
        self.outer = [outer]
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.outer[0].how(self.work, x) if self.outer[0].inside else self.work(x)

    def work(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.gelu(self.up(x)))


# -- what is computed ----------------------------------------------------------------------------


@pytest.mark.parametrize("section", [{}, {"prefetch": 0, "keep_last": 0}, {"prefetch": 9}], ids=str)
@pytest.mark.parametrize("case", [(gpt, tokens), (ConvNet, images)], ids=["gpt", "conv"])
def test_gradients_are_those_of_plain_torch(case: Any, section: dict[str, Any]) -> None:
    make, data = case
    plain = make()
    moved = copy.deepcopy(plain)
    offloader = offload(moved, **section)
    for _ in range(2):
        losses = [module(*data()) for module in (plain, moved)]
        assert offloader.memory.pool.in_use > 0
        assert torch.equal(*losses)
        assert equal(gradients(plain, losses[0]), gradients(moved, losses[1]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_dropout_are_as_ever(dtype: torch.dtype) -> None:
    plain = gpt(dropout=0.3)
    moved = copy.deepcopy(plain)
    offload(moved)
    found = []
    for module in (plain, moved):
        torch.manual_seed(7)
        with torch.autocast("cpu", dtype):
            loss = module(*tokens())
        found.append(gradients(module, loss))
    assert equal(*found)


@pytest.mark.parametrize("inside", [False, True], ids=["around", "inside"])
@pytest.mark.parametrize("how", CHECKPOINTED)
def test_checkpointed_blocks_send_their_inputs_only(how: str, inside: bool) -> None:
    plain, moved = (Checkpointed(how, inside=inside) for _ in range(2))
    offloader = offload(moved, keep_last=0)
    x = torch.randn(16, 8, requires_grad=True)
    ours, theirs = moved(x), plain(x)
    # The inputs of blocks: 16 x 32 floats each; a block's own activations are twice that.
    assert offloader.memory.pool.in_use <= (LAYERS + 1) * 4096 + 4096
    assert equal(gradients(moved, ours), gradients(plain, theirs))
    assert offloader.memory.pool.in_use == 0


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("how", CHECKPOINTED)
def test_a_model_that_is_recomputed_as_a_whole_is_left_alone(how: str) -> None:
    plain, moved = (Checkpointed(how, inside=False) for _ in range(2))
    offloader = offload(moved, keep_last=0)
    x = torch.randn(16, 8, requires_grad=True)
    found = [
        gradients(module, checkpoint(module, x, use_reentrant=how == "reentrant"))
        for module in (plain, moved)
    ]
    assert equal(*found)
    assert offloader.memory.pool.total == 0


def test_hooks_around_the_model_go_before() -> None:
    module = gpt()
    offloader = offload(module)
    with torch.autograd.graph.save_on_cpu():
        loss = module(*tokens())
    loss.backward()
    assert offloader.memory.pool.total == 0


def test_a_tensor_that_is_changed_between_two_uses_is_sent_twice() -> None:
    class Twice(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            y = x * 1
            first = y.sin()
            y.mul_(2)
            return first, y.cos()

    x = torch.linspace(0, 1, 64, requires_grad=True)
    module = Twice()
    offload(module)
    first, second = module(x)
    (found,) = torch.autograd.grad(second.sum(), x)
    assert torch.equal(found, torch.autograd.grad(Twice()(x)[1].sum(), x)[0])
    assert first.requires_grad  # its graph is alive, and so is what it has sent


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_blocks_may_be_compiled(backend: str) -> None:
    plain = gpt()
    moved = copy.deepcopy(plain)
    offloader = offload(moved)
    found = []
    for module in (plain, moved):
        for block in module.blocks:
            block.forward = torch.compile(block.forward, backend=backend)
        loss = module(*tokens())
        found.append((loss, offloader.memory.pool.in_use))
    assert found[0][1] == 0 < found[1][1]
    assert equal(gradients(plain, found[0][0]), gradients(moved, found[1][0]))


def test_several_forwards_may_be_open_at_once() -> None:
    plain = gpt()
    moved = copy.deepcopy(plain)
    offload(moved)
    found = []
    for module in (plain, moved):
        first, second = module(*tokens(1)), module(*tokens(2))
        first.backward()
        second.backward()
        found.append([p.grad for p in module.parameters()])
    assert equal(*found)


def test_a_graph_may_be_used_twice() -> None:
    plain = gpt()
    moved = copy.deepcopy(plain)
    offloader = offload(moved)
    found = []
    for module in (plain, moved):
        loss = module(*tokens())
        loss.backward(retain_graph=True)
        loss.backward()
        found.append([p.grad for p in module.parameters()])
        del loss
    assert equal(*found)
    assert offloader.memory.pool.in_use == 0


def test_gradients_of_gradients_are_those_of_plain_torch() -> None:
    found = []
    for keep_last in (None, 0):
        module = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(LAYERS)))
        torch.manual_seed(3)
        for parameter in module.parameters():
            nn.init.normal_(parameter)
        if keep_last is not None:
            offload(module, keep_last=keep_last)
        x = torch.linspace(-1, 1, 16).view(2, 8).requires_grad_()
        (slope,) = torch.autograd.grad(module(x).sum(), x, create_graph=True)
        found.append(gradients(module, slope.square().sum()))
    assert equal(*found)


# -- what is kept --------------------------------------------------------------------------------


def outputs_of(module: nn.Module) -> list[StorageWeakRef]:
    """Weak references to what every block of the next forward answers."""
    found: list[StorageWeakRef] = []
    for block in module.blocks:
        block.up.register_forward_hook(
            lambda _module, _inputs, output: found.append(StorageWeakRef(output.untyped_storage()))
        )
    return found


@pytest.mark.parametrize("keep_last", [0, 1, 3])
def test_what_was_sent_is_freed_and_the_last_blocks_keep_theirs(keep_last: int) -> None:
    module = gpt()
    offload(module, keep_last=keep_last)
    saved = outputs_of(module)
    loss = module(*tokens())
    gc.collect()
    assert [ref.expired() for ref in saved] == [n < LAYERS - keep_last for n in range(LAYERS)]
    loss.backward()
    assert all(ref.expired() for ref in saved)


def test_a_block_is_freed_when_the_next_one_ends() -> None:
    module = gpt()
    offload(module)
    saved = outputs_of(module)
    alive = []
    for block in module.blocks:
        block.register_forward_hook(
            lambda *_: alive.append(sum(not reference.expired() for reference in saved))
        )
    module(*tokens())
    assert max(alive) <= 2


def test_small_tensors_parameters_and_buffers_stay() -> None:
    module = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.ReLU()) for _ in range(3)))
    offloader = offload(module, min_bytes=2048, keep_last=0)
    x = torch.randn(2, 64)  # 512 bytes; weights have 16 KiB
    module(x).sum()
    assert offloader.memory.pool.peak == 0
    module(torch.randn(8, 64)).sum()
    assert offloader.memory.pool.peak > 0


def test_sparse_tensors_stay() -> None:
    class Mixes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mixing", torch.eye(64).to_sparse())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.sparse.mm(self.mixing, x).exp().sum()

    module = Mixes()
    offload(module)
    x = torch.randn(64, 8, requires_grad=True)
    (found,) = torch.autograd.grad(module(x), x)
    assert torch.equal(found, torch.autograd.grad(Mixes()(x), x)[0])


def test_views_of_one_storage_are_stored_once() -> None:
    class Split(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            whole = x * 2  # 4 KiB
            one, two = whole.view(2, 512)
            return (one * two + whole.view(512, 2)[:, 0].exp() * whole.sin().sum()).sum()

    module = Split()
    offloader = offload(module)
    x = torch.randn(1024, requires_grad=True)
    loss = module(x)
    sizes = [4096, 2048]  # the whole, and the result of exp
    assert sum(sizes) <= offloader.memory.pool.in_use <= sum(sizes) + 3 * 4096
    (ours,) = torch.autograd.grad(loss, x)
    (theirs,) = torch.autograd.grad(Split()(x), x)
    assert torch.equal(ours, theirs)


def test_without_gradients_nothing_is_touched() -> None:
    module = gpt()
    offloader = offload(module)
    with torch.no_grad():
        module(*tokens())
    assert offloader.memory.pool.total == 0


def test_a_graph_that_is_dropped_gives_its_memory_back() -> None:
    module = gpt()
    offloader = offload(module)
    loss = module(*tokens())
    assert offloader.memory.pool.in_use > 0
    del loss
    gc.collect()
    assert offloader.memory.pool.in_use == 0


def test_memory_is_used_again_in_every_step() -> None:
    module = gpt()
    offloader = offload(module)
    totals = []
    for step in range(4):
        module(*tokens(step)).backward()
        totals.append(offloader.memory.pool.total)
    assert len(set(totals)) == 1


def test_a_pool_holds_no_more_than_was_once_in_use() -> None:
    pool = HostPool(choose_accelerator(), pin=False)
    large = [pool.take(1 << 20) for _ in range(2)]
    for buffer in large:
        pool.give(buffer, Reached())
    small = [pool.take(1 << 16) for _ in range(24)]
    assert pool.total <= pool.peak == 2 << 20
    assert all(buffer.numel() == 1 << 16 for buffer in small)


@pytest.mark.parametrize("nbytes", [1, 4096, 5000, 123_457, (1 << 20) + 1])
def test_buffers_are_at_most_a_quarter_or_a_page_too_large(nbytes: int) -> None:
    size = HostPool(choose_accelerator(), pin=False).take(nbytes).numel()
    assert nbytes <= size <= max(nbytes * 1.25, nbytes + 4095)


# -- the order of backward -----------------------------------------------------------------------


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happens in backward: fetches that begin, and uses."""
    events: list[str] = []
    fetch, use = HostActivation.fetch, HostActivation.on_device

    def noted_fetch(self: HostActivation) -> None:
        if self._source is None and self._back is None:
            events.append("fetch")
        fetch(self)

    def noted_use(self: HostActivation) -> torch.Tensor:
        events.append("use" if self._back is not None else "late")
        return use(self)

    monkeypatch.setattr(HostActivation, "fetch", noted_fetch)
    monkeypatch.setattr(HostActivation, "on_device", noted_use)
    return events


def test_backward_finds_everything_on_its_way(fetched: list[str]) -> None:
    module = gpt()
    offload(module)
    loss = module(*tokens())
    loss.backward()
    assert fetched[0] == "fetch"
    assert "late" not in fetched


@pytest.mark.parametrize("prefetch", [0, 1, 2])
def test_as_many_blocks_as_wanted_are_ahead(prefetch: int) -> None:
    module = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(6)))
    offloader = offload(module, prefetch=prefetch, keep_last=0)
    away: list[int] = []
    live: list[Activation] = []
    send = offloader.memory.send

    def noted(*arguments: Any) -> Activation:
        activation = send(*arguments)
        live.append(activation)
        return activation

    offloader.memory.send = noted  # type: ignore[method-assign]
    loss = module(torch.randn(4, 8, requires_grad=True)).sum()
    for block in module:
        block[0].weight.register_hook(lambda _: away.append(sum(a._back is None for a in live)))
    loss.backward()
    # A block needs its input, which is the tanh of the block before, and its own tanh.
    assert away[0] == len(live) - 2 - prefetch
    # ``live`` keeps all of them, as a retained graph does, but not on the device.
    assert away[-1] == len(live) - 2


# -- misuse --------------------------------------------------------------------------------------


class InPlace(nn.Module):
    def __init__(self, change: Callable[[torch.Tensor], object]) -> None:
        super().__init__()
        self.change = change

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.exp()  # its backward needs y
        self.change(y)
        return y.sum()


@pytest.mark.parametrize("min_bytes", [1, 1 << 20], ids=["sent", "kept"])
def test_a_change_in_place_is_an_error_as_in_plain_torch(min_bytes: int) -> None:
    x = torch.randn(64, requires_grad=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        InPlace(lambda y: y.mul_(2))(x).backward()
    module = InPlace(lambda y: y.mul_(2))
    offload(module, min_bytes=min_bytes)
    with pytest.raises(TrainingError, match=r"shape \(64,\) .* was changed in place"):
        module(x).backward()


def test_a_change_of_parameters_before_backward_is_an_error() -> None:
    module = gpt()
    offload(module)
    loss = module(*tokens())
    with torch.no_grad():
        module.blocks[0].up.weight.mul_(2)
    with pytest.raises(TrainingError, match="was changed in place"):
        loss.backward()


def test_a_forward_that_fails_leaves_no_hooks_behind() -> None:
    module = gpt()
    offloader = offload(module)
    with pytest.raises(IndexError):
        module(torch.full((1, 4), 999), torch.zeros(1, 4, dtype=torch.int64))
    x = torch.randn(4096, requires_grad=True)
    x.exp().sum().backward()
    assert torch._C._autograd._top_saved_tensors_default_hooks(False) is None
    assert offloader.memory.pool.in_use == 0
    gradients(module, module(*tokens()))


def test_a_closed_offloader_leaves_the_module_as_it_was() -> None:
    module = gpt()
    offloader = offload(module)
    offloader.close()
    module(*tokens()).backward()
    assert offloader.memory.pool.total == 0


def test_memory_that_cannot_be_locked_is_ordinary_and_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    accelerator = choose_accelerator()
    pool = HostPool(accelerator, pin=True)
    pool._pin = True  # as on a device that is not the host

    def refuse(_tensor: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no more locked pages")

    monkeypatch.setattr(accelerator, "pin_memory", refuse)
    assert pool.take(10).numel() == 4096
    pool.take(10)
    assert len([r for r in caplog.records if "no more locked pages" in r.getMessage()]) == 1
