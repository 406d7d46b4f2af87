"""Batches in halves (Domino): what is computed, what is under way then, what stays whole."""

from __future__ import annotations

import logging
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from drivetrain_tensor.plugin import TensorParallel
from drivetrain_tensor.section import PATH, TensorParallelSection
from tensor_models import MODELS, ROWS, TOKENS, build, reference
from test_tensor_training import STEPS, full, make, train
from torch import nn
from torch.nn import functional as F

from drivetrain.communication.byte_log import ByteLog
from drivetrain.contracts import Collective, Handle, Purpose
from drivetrain.errors import ConfigError
from drivetrain.testing import run_distributed

WIDTH, INNER, SAMPLES, LENGTH = 8, 12, 5, 3
HALVED = {"domino": True}


# -- models of Transformers ------------------------------------------------------------------------


def trained(names: list[str], section: dict[str, Any]) -> dict[str, Any]:
    """Losses, whole parameters and bytes of sums, by model."""
    found = {}
    for name in names:
        engine = make(build(name), 2, **section)
        losses = train(engine, 1)
        engine.job.byte_log.reset()
        losses += train_from(engine, 1)
        moved = engine.job.byte_log.total(Purpose.ACTIVATION, "tp", "all_reduce")
        found[name] = losses, full(engine), moved.payload_bytes
        engine.destroy()
    return found


def train_from(engine: Any, first: int) -> list[float]:
    from tensor_models import loss_of

    losses = []
    for step in range(first, STEPS):
        loss = loss_of(engine, step)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def test_models_train_as_whole_ones_and_send_no_more() -> None:
    names = list(MODELS)
    both = zip(
        run_distributed(trained, 2, names, {**HALVED, "vocabulary": False}),
        run_distributed(trained, 2, names, {"vocabulary": False}),
        strict=True,
    )
    for halves, plain in both:
        for name in names:
            losses, parameters, moved = halves[name]
            model = build(name)
            assert losses == pytest.approx(reference(model, STEPS), rel=1e-9), name
            assert moved == plain[name][2], name
            for path, expected in model.named_parameters():
                close = torch.allclose(parameters[path], expected, rtol=1e-8, atol=1e-10)
                assert close, (name, path)


def test_bytes_are_those_of_the_formula() -> None:
    """Shoeybi et al. 2019, section 3: four sums of batch x tokens x width in each layer."""
    for found in run_distributed(trained, 2, ["llama", "gpt2"], {**HALVED, "vocabulary": False}):
        for name, (_, _, moved) in found.items():
            assert moved == (STEPS - 1) * 2 * 4 * ROWS * TOKENS * 16 * 8, name


# -- what is under way while what computes ---------------------------------------------------------


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(x)))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.m = Mlp(), Mlp()
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.a(self.norm(x))
        return x + self.m(x)


class Net(nn.Module):
    """Repeated blocks of some kind between two layers that stay whole."""

    def __init__(self, kind: type[nn.Module] = Block) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)
        self.blocks = nn.ModuleList([kind(), kind()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(x)


def samples(step: int = 0, count: int = SAMPLES) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(count, LENGTH, WIDTH, generator=generator, dtype=torch.float64)


def order_of_work() -> list[str]:
    """Products, sums that begin and sums that are waited for, of the first block's way."""
    engine, log = make(Net().double(), 2, **HALVED), list[str]()
    engine.backward(engine(samples()).square().mean())
    engine.step()
    run = ByteLog.run

    def noted(self: ByteLog, collective: Collective) -> Handle:
        handle = run(self, collective)
        if collective.tag.purpose is not Purpose.ACTIVATION or not collective.asynchronous:
            return handle
        rows = collective.output.numel() // (LENGTH * WIDTH)
        log.append(f"begin {rows}")
        return _Noted(handle, partial(log.append, f"end {rows}"))

    ByteLog.run = noted  # type: ignore[method-assign]
    for name in ("a", "m"):
        engine.module.blocks[0].get_submodule(name).up.register_forward_hook(
            partial(note, log, name)
        )
    try:
        loss = engine(samples()).square().mean()
        forward, log[:] = list(log), []
        engine.backward(loss)
    finally:
        ByteLog.run = run  # type: ignore[method-assign]
    engine.destroy()
    return [*forward[:14], "|", *log[-14:]]


class _Noted:
    def __init__(self, handle: Handle, note: Any) -> None:
        self._handle, self._note = handle, note

    def wait(self) -> None:
        self._handle.wait()
        self._note()


def note(log: list[str], name: str, module: nn.Module, args: Any, output: torch.Tensor) -> None:
    log.append(f"{name}{output.shape[0]}")
    output.register_hook(lambda gradient: log.append(f"{name}{gradient.shape[0]}"))


def test_one_half_computes_while_a_sum_of_the_other_is_under_way() -> None:
    """Halves have three and two samples; ``a3`` multiplies in the first layer of the first half."""
    forward = "a3 begin 3 a2 begin 2 end 3 m3 begin 3 end 2 m2 begin 2 end 3 end 2"
    backward = "m2 begin 2 m3 begin 3 end 2 a2 begin 2 end 3 a3 begin 3 end 2 end 3"
    for found in run_distributed(order_of_work, 2):
        text = " ".join(found)
        assert text.startswith(forward)
        assert text.endswith(backward)


# -- odd batches, recomputation, dropout, and blocks that are no sums over samples -----------------


class TimeMajor(Block):
    """Tokens lie along the first dimension, and depend on each other."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x + x.cumsum(0))


class OverTheBatch(Block):
    """In training, means over all samples."""

    def __init__(self) -> None:
        super().__init__()
        self.batch = nn.BatchNorm1d(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(self.batch(x.movedim(1, -1)).movedim(-1, 1))


class Dropping(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(F.dropout(x, 0.5, self.training))


class Biased(Block):
    """Gets a table with as many rows as there may be samples."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(SAMPLES, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x + self.table.mean(0))


KINDS: dict[str, type[nn.Module]] = {
    kind.__name__: kind for kind in (Block, TimeMajor, OverTheBatch, Biased)
}


def of_kind(name: str, counts: list[int], section: dict[str, Any]) -> tuple[list[float], Any, str]:
    """Losses, whole parameters and buffers, and warnings."""
    texts: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: texts.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("drivetrain.tensor").addHandler(handler)
    engine = make(Net(KINDS[name]).double(), 2, **section)
    losses = []
    for step, count in enumerate(counts):
        loss = (engine(samples(step, count)) - 1).square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    found = full(engine) | {n: b.clone() for n, b in engine.module.named_buffers()}
    engine.destroy()
    return losses, found, "; ".join(texts)


@pytest.mark.parametrize("name", KINDS)
def test_any_block_and_batch_train_as_in_one_process(name: str) -> None:
    counts = [5, 1, 2, LENGTH, 4]  # one sample stays whole, and so may LENGTH of them
    model, losses = Net(KINDS[name]).double(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step, count in enumerate(counts):
        optimizer.zero_grad()
        loss = (model(samples(step, count)) - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    expected = dict(model.named_parameters()) | dict(model.named_buffers())
    for found, tensors, warnings in run_distributed(of_kind, 2, name, counts, HALVED):
        assert found == pytest.approx(losses, rel=1e-9)
        for path, tensor in expected.items():
            assert torch.allclose(tensors[path], tensor, rtol=1e-8, atol=1e-10), path
        whole = name in ("TimeMajor", "OverTheBatch")
        assert ("blocks.0 does not compute in halves" in warnings) == whole


def dropped() -> tuple[list[bool], list[torch.Tensor]]:
    """Whether the streams of the ranks agree, and outputs that ranks have in common."""
    engine = make(Net(Dropping).double(), 2, **HALVED)
    outputs = [engine(samples(step)).detach().clone() for step in range(2)]
    known = [
        halving is not None for halving in engine.module.blocks[0].tensor_halving._known.values()
    ]
    engine.destroy()
    return known, outputs


def test_dropout_of_halves_is_the_same_on_all_ranks() -> None:
    (known, first), (_, second) = run_distributed(dropped, 2)
    assert known == [True]
    for one, two in zip(first, second, strict=True):
        assert torch.allclose(one, two, rtol=1e-12, atol=0)
    assert not torch.equal(first[0], first[1])


# -- bad input -------------------------------------------------------------------------------------


def refusal(section: dict[str, Any]) -> str:
    try:
        make(Net().double(), 2, **section)
    except ConfigError as error:
        return str(error)
    return ""


def test_halves_beside_sequences_in_parts_are_refused() -> None:
    for text in run_distributed(refusal, 2, {**HALVED, "sequence_parallel": True}):
        assert "tensor_parallel.domino: not beside sequence_parallel" in text


def test_halves_beside_stages_are_refused() -> None:
    section = TensorParallelSection(autotp_size=2, domino=True)
    plan: Any = SimpleNamespace(layout=SimpleNamespace(size=lambda axis: 2))
    (problem,) = TensorParallel({PATH: section}).configure(plan)
    assert "tensor_parallel.domino: stages of a pipeline" in str(problem)
