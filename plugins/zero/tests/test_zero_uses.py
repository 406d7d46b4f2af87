"""Loops that do more than forward, backward and step train at every stage to plain torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from zero_harness import (
    IN_FORWARD,
    SGD,
    Run,
    Stage,
    adamw,
    assert_equal_to_plain,
    assert_parameters_equal,
    batches,
    config,
    plain,
    run_engine,
    sgd,
    train_steps,
    whole_parameters,
)
from zero_models import BODY, SHARED, UNEVEN, WIDTH

import drivetrain
from drivetrain.contracts import Atom, AxisRequest, Plugin, Purpose, SplitAxis, hookimpl
from drivetrain.engine.engine import Engine
from drivetrain.errors import TrainingError
from drivetrain.job.job import Job
from drivetrain.states.whole import whole
from drivetrain.testing import run_distributed
from drivetrain.testing.data import Samples, vectors
from drivetrain.testing.reference import Case

STAGES = (1, 2, 3, IN_FORWARD)
EVERY_STAGE = pytest.mark.parametrize("stage", STAGES)
REDUCTIONS = pytest.mark.parametrize("reduction", ["micro_batch", "boundary"])


# -- loops -----------------------------------------------------------------------------------------


def plain_backward(engine: Engine, micro_batches: Sequence[Samples], step: int) -> float:
    total = 0.0
    for inputs, targets in micro_batches:
        loss = engine(inputs, targets)
        loss.backward()
        engine.step()
        total += loss.item()
    return total / len(micro_batches)


def without_sync(engine: Engine, micro_batches: Sequence[Samples], step: int) -> float:
    total = 0.0
    for number, (inputs, targets) in enumerate(micro_batches):
        if number < len(micro_batches) - 1:
            with engine.no_sync():
                loss = engine(inputs, targets)
                engine.backward(loss)
        else:
            loss = engine(inputs, targets)
            engine.backward(loss)
        engine.step()
        total += loss.item()
    return total / len(micro_batches)


def coalesced(engine: Engine, micro_batches: Sequence[Samples], step: int) -> float:
    """No gradient travels before the block ends."""
    losses, sent = [], engine.job.byte_log.total(Purpose.GRADIENT).calls
    with engine.coalesce_grad_reduction():
        for inputs, targets in micro_batches:
            losses.append(engine(inputs, targets))
            engine.backward(losses[-1])
        with pytest.raises(TrainingError, match="leave the block before stepping"):
            engine.step()
        assert engine.job.byte_log.total(Purpose.GRADIENT).calls == sent
    for _ in micro_batches:
        engine.step()
    return sum(loss.item() for loss in losses) / len(losses)


def evaluates_between(engine: Engine, micro_batches: Sequence[Samples], step: int) -> float:
    """Passes without gradients before each micro-batch, before backward, and after the step."""
    total = 0.0
    for inputs, targets in micro_batches:
        _evaluate(engine, inputs, targets, torch.no_grad)
        loss = engine(inputs, targets)
        _evaluate(engine, inputs, targets, torch.inference_mode)
        engine.backward(loss)
        _evaluate(engine, inputs, targets, torch.inference_mode)
        engine.step()
        total += loss.item()
    return total / len(micro_batches)


def _evaluate(
    engine: Engine, inputs: torch.Tensor, targets: torch.Tensor, mode: Callable[[], Any]
) -> None:
    engine.eval()
    with mode():
        first, second = engine(inputs, targets), engine(inputs, targets)
    engine.train()
    assert torch.equal(first, second)


def two_losses_one_backward(engine: Engine, micro_batches: Sequence[Samples], step: int) -> float:
    """Forward of all micro-batches comes before any backward."""
    losses = [engine(inputs, targets) for inputs, targets in micro_batches]
    for loss in losses:
        engine.backward(loss)
        engine.step()
    return sum(loss.item() for loss in losses) / len(losses)


def wholes_between(engine: Engine, micro_batches: Sequence[Samples], step: int) -> float:
    """Parameters are read whole and written back between the passes."""
    before = {n: p.clone() for n, p in whole_parameters(engine).items()}
    with whole(engine.module, write_rank=0):
        pass
    loss = run_engine(engine, micro_batches, step)
    assert any(not torch.equal(before[n], p) for n, p in whole_parameters(engine).items())
    return loss


def unfreezes(engine: Engine, micro_batches: Sequence[Samples], step: int) -> float:
    """The second block is frozen in steps 1 and 2, the head until step 2."""
    first = engine.module.blocks[1]
    if step == 1:
        first.requires_grad_(False)
        engine.module.head.requires_grad_(False)
        engine.rebuild()
    if step == 3:
        first.requires_grad_(True)
        engine.module.head.requires_grad_(True)
        engine.rebuild()
    return run_engine(engine, micro_batches, step)


LOOPS = [
    *(plain_backward, without_sync, coalesced),
    *(evaluates_between, two_losses_one_backward, wholes_between),
]


@EVERY_STAGE
@REDUCTIONS
@pytest.mark.parametrize("loop", LOOPS, ids=[loop.__name__ for loop in LOOPS])
def test_a_loop_trains(stage: Stage, reduction: str, loop: Any) -> None:
    settings = config(
        stage, accumulation=3, gradient_clipping=0.1, zero={"gradient_reduction": reduction}
    )
    assert_equal_to_plain(Run(settings, UNEVEN, loop=loop), 2)


@EVERY_STAGE
@pytest.mark.parametrize("case", [BODY, SHARED], ids=["plain", "tied"])
def test_freezing_and_unfreezing_keeps_the_states_that_remain(stage: Stage, case: Case) -> None:
    run = Run(config(stage, accumulation=2, optimizer=SGD), case, steps=6, loop=unfreezes)
    assert_equal_to_plain(run, 3, expected=_plain_unfreezing(run, 3, sgd))


@EVERY_STAGE
def test_bias_correction_goes_on_where_it_was_after_unfreezing(stage: Stage) -> None:
    """Adam's moments alone do not tell how many updates they have seen."""
    run = Run(config(stage), BODY, steps=6, loop=unfreezes)
    assert_equal_to_plain(run, 2, expected=_plain_unfreezing(run, 2, adamw))


def _plain_unfreezing(
    run: Run, shards: int, client: Callable[[list[nn.Parameter]], torch.optim.Optimizer]
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """With plain torch. What is frozen loses its states; a tied parameter is when one module is."""
    model, losses = run.case.model(), []
    optimizer = client(list(model.parameters()))
    for step, micro_batches in enumerate(batches(run, shards)):
        if step in (1, 3):
            model.blocks[1].requires_grad_(step == 3)
            model.head.requires_grad_(step == 3)
            for parameter in model.parameters():
                if not parameter.requires_grad:
                    optimizer.state.pop(parameter, None)
        optimizer.zero_grad(set_to_none=True)
        pairs = [pair for micro in micro_batches for pair in micro]
        loss = torch.stack([model(*pair) for pair in pairs]).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, {name: p.detach() for name, p in model.named_parameters()}


# -- several engines -------------------------------------------------------------------------------


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(3)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def encoders() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(3)
    return Encoder(), Encoder()


def joint_loss(first: nn.Module, second: nn.Module, pair: Samples) -> torch.Tensor:
    inputs, targets = pair
    return nn.functional.mse_loss(second(first(inputs)) + first(targets), targets)


def trains_two_engines(run: Run, other: dict[str, Any]) -> list[float]:
    engines = []
    for module, settings in zip(encoders(), (run.config, other), strict=True):
        engine, *_ = drivetrain.initialize(model=module, config=settings)
        engines.append(engine)
    shard = engines[0].job.mesh.coordinate("dp")
    losses = []
    for step in batches(run, 2):
        loss = joint_loss(*engines, step[0][shard])
        loss.backward()
        for engine in engines:
            engine.step()
        losses.append(loss.item())
    for engine in engines[::-1]:
        engine.destroy()
    return losses


@pytest.mark.parametrize(("stage", "other"), [(1, 3), (2, 2), (3, 3), (3, 0), (IN_FORWARD, 3)])
def test_two_engines_train_on_one_loss(stage: Stage, other: Stage) -> None:
    run = Run(config(stage), BODY, steps=6)
    answers = run_distributed(trains_two_engines, 2, run, config(other))
    modules, expected = encoders(), []
    optimizer = adamw([p for module in modules for p in module.parameters()])
    for step in batches(run, 2):
        loss = torch.stack([joint_loss(*modules, pair) for pair in step[0]]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    assert [sum(s) / 2 for s in zip(*answers, strict=True)] == pytest.approx(expected, rel=1e-6)


# -- reductions ------------------------------------------------------------------------------------


class Sites(nn.Module):
    """A shared body, and one bias for each of two groups of ranks; a sample says its group."""

    def __init__(self, groups: int = 2) -> None:
        super().__init__()
        self.body = Encoder()
        self.sites = nn.ParameterList(torch.full((WIDTH,), 0.1 * (g + 1)) for g in range(groups))

    def forward(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        site = self.sites[int(inputs[0, 0]) % len(self.sites)]
        return nn.functional.mse_loss(self.body(inputs[:, 1:]) * site, targets)


def sites() -> nn.Module:
    torch.manual_seed(5)
    return Sites()


def grouped_vectors(count: int) -> Samples:
    """Micro-batches take turns in belonging to the first and the second group."""
    inputs, targets = vectors(count)
    group = torch.arange(count) // 2 % 2
    return torch.cat([group.unsqueeze(1).float(), inputs], dim=1), targets


class OwnSite(Plugin):
    """Every rank keeps the bias of its group; ranks of one group reduce it between them."""

    name = "own_site"

    @hookimpl
    def mesh_axes(self) -> Sequence[AxisRequest]:
        return [SplitAxis("site", 2, complement="same_site")]

    @hookimpl
    def describe_parameters(self, job: Job, module: nn.Module) -> None:
        own = job.mesh.coordinate("site")
        bias = module.sites[own]
        module.sites = nn.ParameterList([bias])
        info = job.parameters.info(bias)
        info.reduction, info.distinct = "same_site", ("site",)


@EVERY_STAGE
@REDUCTIONS
def test_parameters_of_some_ranks_are_reduced_between_those(stage: Stage, reduction: str) -> None:
    settings = config(
        stage,
        accumulation=2,
        gradient_clipping=0.05,
        zero={"gradient_reduction": reduction},
        plugins={"own_site": True},
    )
    assert_equal_to_plain(Run(settings, Case(sites, grouped_vectors), plugins=[OwnSite]), 4)


class Copies(Plugin):
    """Pairs of ranks do the same work, as tensor parallelism does with what it cannot cut."""

    name = "copies"
    axes: ClassVar[Sequence[AxisRequest]] = (Atom("tp", 2),)

    @hookimpl
    def mesh_axes(self) -> Sequence[AxisRequest]:
        return self.axes


@EVERY_STAGE
def test_copies_count_once_in_the_norm(stage: Stage) -> None:
    settings = config(stage, gradient_clipping=0.05, plugins={"copies": True}, optimizer=SGD)
    assert_equal_to_plain(Run(settings, BODY, plugins=[Copies]), 4, shards=2, optimizer=sgd)


# -- other uses ------------------------------------------------------------------------------------


def serves_without_optimizer(run: Run) -> None:
    module = run.case.model()
    expected = run.case.model()
    settings = {key: value for key, value in run.config.items() if key != "optimizer"}
    engine, *_ = drivetrain.initialize(model=module, config=settings)
    inputs, targets = run.case.data(2)
    with torch.inference_mode():
        assert torch.equal(engine(inputs, targets), expected(inputs, targets))
    engine.destroy()


@EVERY_STAGE
def test_an_engine_without_optimizer_computes_alike(stage: Stage) -> None:
    run_distributed(serves_without_optimizer, 2, Run(config(stage), UNEVEN))


def loads_weights(run: Run) -> None:
    """A state dict of the plain model replaces parameters and masters."""
    engine = run.engine()
    torch.manual_seed(99)
    other = {name: torch.randn_like(v) for name, v in run.case.model().state_dict().items()}
    engine.load_module_state_dict(other)
    assert_parameters_equal(engine.module_state_dict(), other)
    losses = train_steps(run, engine, range(1))
    model = run.case.model()
    model.load_state_dict(other)
    pairs = batches(run, 2)[0][0]
    assert losses[0] == pytest.approx(
        model(*pairs[engine.job.mesh.coordinate("dp")]).item(), rel=1e-5
    )
    torch.stack([model(*pair) for pair in pairs]).mean().backward()
    sgd(list(model.parameters())).step()
    assert_parameters_equal(whole_parameters(engine), dict(model.named_parameters()))
    engine.destroy()


@EVERY_STAGE
def test_loaded_weights_are_what_training_goes_on_from(stage: Stage) -> None:
    run_distributed(loads_weights, 2, Run(config(stage, optimizer=SGD), BODY))


def skips_overflow(run: Run) -> list[bool]:
    """One rank's gradient overflows in step 1; all ranks skip, and train on."""
    engine = run.engine()
    applied = []
    for step in range(3):
        inputs, targets = run.case.data(2)
        factor = 1e30 if step == 1 and engine.job.rank == 1 else 1.0
        before = whole_parameters(engine)
        engine.backward(engine(inputs.half(), targets) * factor)
        engine.step()
        applied.append(engine.was_step_applied())
        if not applied[-1]:
            assert all(torch.equal(p, before[n]) for n, p in whole_parameters(engine).items())
    engine.destroy()
    return applied


@EVERY_STAGE
def test_an_overflow_on_one_rank_skips_the_step_on_all(stage: Stage) -> None:
    settings = config(stage, fp16={"enabled": True, "initial_scale_power": 4, "hysteresis": 1})
    answers = run_distributed(skips_overflow, 2, Run(settings, BODY))
    assert answers == [[True, False, True]] * 2


@EVERY_STAGE
def test_the_reported_norm_is_that_of_the_whole_gradient(stage: Stage) -> None:
    run = Run(config(stage, gradient_clipping=1e6, optimizer=SGD), UNEVEN, steps=1)
    model = run.case.model()
    torch.stack([model(*pair) for pair in batches(run, 3)[0][0]]).mean().backward()
    expected = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    for norm in run_distributed(norm_of_first_step, 3, run):
        assert norm == pytest.approx(expected.item(), rel=1e-6)


def norm_of_first_step(run: Run) -> float:
    engine = run.engine()
    train_steps(run, engine, range(1))
    norm = engine.get_global_grad_norm()
    engine.destroy()
    assert norm is not None
    return norm


def test_the_reference_of_these_tests_learns_something() -> None:
    losses, _ = plain(Run(config(1), BODY, steps=20), 2)
    assert losses[-1] < 0.8 * losses[0]
