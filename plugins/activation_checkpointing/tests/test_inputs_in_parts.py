"""Saved inputs in parts over tensor-parallel ranks, and random streams in which these differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar
from unittest.mock import patch

import pytest
import torch
from drivetrain_activation_checkpointing import (
    checkpoint,
    configure,
    get_cuda_rng_tracker,
    is_configured,
    model_parallel_cuda_manual_seed,
    model_parallel_reconfigure_tp_seed,
    non_reentrant_checkpoint,
    partition_activations_in_checkpoint,
    reset,
    set_num_layers,
)
from drivetrain_activation_checkpointing.saving import InputStore
from torch import nn
from torch.nn import functional as F

import drivetrain
from drivetrain.communication.functional import Functional, functional
from drivetrain.contracts import (
    Atom,
    AxisRequest,
    Phase,
    Plugin,
    PositiveInt,
    Section,
    Sections,
    Transform,
    hookimpl,
)
from drivetrain.engine.engine import Engine
from drivetrain.errors import ConfigError, TrainingError
from drivetrain.job.job import Job
from drivetrain.plan.registry import Registry
from drivetrain.testing import run_distributed

WIDTH, ROWS, TP = 4, 3, 2


class ToyTensorSection(Section):
    tp: PositiveInt = 1


class ToyTensor(Plugin):
    """Each tensor-parallel rank computes some of the hidden units; parameters are whole."""

    name = "toy_tensor"
    sections: ClassVar[Sections] = {"toy_tensor": ToyTensorSection}

    @hookimpl
    def mesh_axes(self) -> Sequence[AxisRequest]:
        return [Atom("tp", self.section(ToyTensorSection).tp)]

    @hookimpl
    def transform_module(self, job: Job, module: nn.Module) -> Sequence[Transform]:
        def cut(model: nn.Module) -> nn.Module:
            for block in model.modules():
                if isinstance(block, Block):
                    block.tp = functional(job.communicator, "tp")
                    block.place = job.mesh.coordinate("tp")
            return model

        return [Transform(Phase.PARTITION, cut)]


class Block(nn.Module):
    """Draws alike on all ranks outside of the cut part, and from their own stream inside."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 2 * TP)
        self.down = nn.Linear(2 * TP, WIDTH)
        self.tp: Functional
        self.place = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.dropout(x, 0.3, self.training)
        rows = slice(2 * self.place, 2 * self.place + 2)
        hidden = F.linear(self.tp.copy(x), self.up.weight[rows], self.up.bias[rows]).tanh()
        with get_cuda_rng_tracker().fork():
            hidden = F.dropout(hidden, 0.3, self.training)
        return x + self.tp.reduce(F.linear(hidden, self.down.weight[:, rows]))


class Model(nn.Module):
    """Its blocks are recomputed by the config, or by a function of the script's."""

    def __init__(self, run: Any = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(3, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.run = run

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x) if self.run is None else self.run(block, x)
        return x.square().mean()


def make(model: nn.Module, **section: Any) -> Engine:
    engine, *_ = drivetrain.initialize(
        model=model,
        config={
            "train_micro_batch_size_per_gpu": ROWS,
            "optimizer": {"type": "SGD", "params": {"lr": 0.2}},
            "gradient_clipping": 0.0,
            "toy_tensor": {"tp": TP},
            **({"activation_checkpointing": section} if section else {}),
        },
        registry=Registry.installed().with_plugins(ToyTensor),
    )
    return engine


def curve(run: Any = None, **section: Any) -> tuple[list[Any], int]:
    """Losses and gradients at the end, and how many elements were gathered from parts."""
    engine = make(Model(run), **section)
    model_parallel_cuda_manual_seed(5)
    found, gathered, gather = [], 0, InputStore.gather

    def count(store: InputStore, part: torch.Tensor) -> torch.Tensor:
        nonlocal gathered
        gathered += part.numel()
        return gather(store, part)

    with patch.object(InputStore, "gather", count):
        for step in range(3):
            x = torch.randn(ROWS, 3, generator=torch.Generator().manual_seed(step))
            loss = engine(x)
            engine.backward(loss)
            engine.step()
            found.append(loss.item())
    found += [p.detach().tolist() for p in engine.module.parameters()]
    found.append(
        torch.rand(2, generator=engine.job.random.generator("model-parallel-rng")).tolist()
    )
    engine.job.close()
    return found, gathered


def curves() -> list[tuple[list[Any], int]]:
    found = [
        curve(),
        curve(recompute="all"),
        curve(recompute="all", partition_activations=True),
        curve(
            recompute="all",
            partition_activations=True,
            contiguous_memory_optimization=True,
            number_checkpoints=2,
        ),
        curve(recompute="as_needed", memory_limit=600, partition_activations=True),
    ]
    configure(None, None, partition_activations=True)
    found += [curve(checkpoint), curve(non_reentrant_checkpoint)]
    return found


def test_training_is_bitwise_that_without_on_ranks_that_keep_parts() -> None:
    ranks = run_distributed(curves, TP, timeout=100)
    for (expected, nothing), (plain, whole), *partitioned in ranks:
        assert plain == expected
        assert (nothing, whole) == (0, 0)
        for found, gathered in partitioned:
            assert found == expected
            assert gathered > 0
    # They drew from streams of their own.
    assert ranks[0][0][0][:3] == ranks[1][0][0][:3]
    assert ranks[0][0][0][-1] != ranks[1][0][0][-1]


def inputs() -> list[Any]:
    """Gathers by input: alike on ranks, different, not dense, exempt, and used twice."""
    engine = make(Model(), partition_activations=True)
    place = engine.job.mesh.coordinate("tp")
    linear = nn.Linear(4, 4)
    kept: list[int] = []
    keep = InputStore.keep

    def count(store: InputStore, tensor: torch.Tensor, key: Any) -> Any:
        found = keep(store, tensor, key)
        kept.append(getattr(found, "_nbytes", 0) // 4)
        return found

    def of(x: torch.Tensor, function: Any) -> int:
        checkpoint(function, x).sum().backward()
        return kept[-1]

    with patch.object(InputStore, "keep", count):
        base = torch.ones(6, 4, requires_grad=True)
        alike = of(base * 2, lambda x: linear(x))
        turned = of((base * 2).t(), lambda x: linear(x.t()))
        different = of(base * place, lambda x: linear(x).sin())
        wide = of((base * 2)[:, :2], lambda x: x.sin())
        odd = of((base * 2)[:1, :3].clone(), lambda x: x.cos())
        constant = of(torch.ones(6, 4), lambda x: linear(x).cos())
        kept.append(-1)
        exempt = base * 2
        exempt.no_checkpointing = True
        exempt = of(exempt, lambda x: linear(x).tanh())
    engine.job.close()
    return [alike, turned, different, wide, odd, constant, exempt]


def test_inputs_are_cut_where_ranks_have_the_same() -> None:
    for found in run_distributed(inputs, TP, timeout=100):
        assert found == [12, 12, 0, 0, 0, 0, -1]


def in_place() -> str:
    engine = make(Model(), partition_activations=True)
    x = torch.ones(3, requires_grad=True) * 2
    y = checkpoint(lambda t: t.sin(), x)
    x.add_(1)
    try:
        y.sum().backward()
    except TrainingError as error:
        return str(error)
    finally:
        engine.job.close()
    return ""


def test_an_input_that_changes_before_backward_is_refused() -> None:
    for found in run_distributed(in_place, TP, timeout=100):
        assert "changed in place after the forward" in found


class Mpu:
    def get_model_parallel_world_size(self) -> int:
        return 4


@pytest.fixture
def job() -> Any:
    engine, *_ = drivetrain.initialize(
        model=nn.Linear(1, 1), config={"train_micro_batch_size_per_gpu": 1}
    )
    yield engine.job
    engine.job.close()
    configure()
    reset()


def test_settings_are_those_of_calls_then_of_the_config(job: Job) -> None:
    config = {"activation_checkpointing": {"number_checkpoints": 3}}
    configure(deepspeed_config=config, contiguous_checkpointing=True)
    assert is_configured()
    set_num_layers(5)
    partition_activations_in_checkpoint(True)
    x = torch.ones(4, requires_grad=True)
    checkpoint(torch.sin, x * 1).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.ones(4).cos())
    with pytest.raises(ConfigError, match="needs number_checkpoints"):
        configure(contiguous_checkpointing=True, num_checkpoints=None)
    with pytest.raises(ConfigError, match="4 tensor-parallel ranks, but the job has 1"):
        configure(Mpu(), partition_activations=True)


def test_streams_have_the_published_seeds_and_go_on(job: Job) -> None:
    tracker = get_cuda_rng_tracker()
    model_parallel_cuda_manual_seed(7)
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(7)))
    expected = torch.Generator().manual_seed(7 + 2718)
    outside = torch.get_rng_state()
    with tracker.fork():
        assert torch.equal(torch.rand(3), torch.rand(3, generator=expected))
    states = tracker.get_states()
    with tracker.fork():
        assert torch.equal(torch.rand(3), torch.rand(3, generator=expected))
    assert torch.equal(torch.get_rng_state(), outside)
    tracker.set_states(states)
    with tracker.fork():
        again = torch.rand(3)
    model_parallel_reconfigure_tp_seed(7)
    with tracker.fork():
        torch.rand(3)
        assert torch.equal(torch.rand(3), again)
    with pytest.raises(TrainingError, match="has begun already"):
        tracker.add("model-parallel-rng", 1)
    with (
        pytest.raises(TrainingError, match="no random stream 'other' has begun"),
        tracker.fork("other"),
    ):
        pass
    tracker.reset()
    assert tracker.get_states() == {}


def test_streams_that_are_seeded_before_a_job_begin_with_it() -> None:
    tracker = get_cuda_rng_tracker()
    tracker.reset()
    model_parallel_cuda_manual_seed(3)
    with pytest.raises(TrainingError, match=r"call drivetrain\.initialize before"):
        tracker.get_states()
    engine, *_ = drivetrain.initialize(
        model=nn.Linear(1, 1), config={"train_micro_batch_size_per_gpu": 1}
    )
    with tracker.fork():
        drawn = torch.rand(2)
    expected = torch.rand(2, generator=torch.Generator().manual_seed(3 + 2718))
    assert torch.equal(drawn, expected)
    engine.job.close()
    tracker.reset()


def test_a_graph_of_second_order_outlives_the_place_of_its_input(job: Job) -> None:
    configure(contiguous_checkpointing=True, num_checkpoints=1)
    x = torch.ones(4, requires_grad=True)
    y = non_reentrant_checkpoint(lambda t: t**3, x * 1)
    (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    del y
    checkpoint(torch.sin, x * 7).sum()  # takes the place
    (curvature,) = torch.autograd.grad(slope.sum(), x)
    assert torch.equal(curvature, torch.full((4,), 6.0))
