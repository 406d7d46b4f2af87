"""Bytes that a rank keeps and moves are those of the ZeRO paper (arXiv:1910.02054, sections 5, 7).

Psi is the number of parameters; N the number of ranks. With bf16, Adam and fp32 masters a rank of
plain data parallelism keeps 2 Psi of parameters, 2 Psi of gradients and 12 Psi of optimizer states.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Mapping
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from zero_harness import IN_FORWARD, Run, Stage, batches, config

import drivetrain
from drivetrain.contracts import Purpose
from drivetrain.engine.engine import Engine
from drivetrain.job.accelerator_choice import HostAccelerator
from drivetrain.plan.registry import Registry
from drivetrain.testing import run_distributed
from drivetrain.testing.data import tokens
from drivetrain.testing.models import TinyGPT
from drivetrain.testing.reference import Case

STAGES = (1, 2, 3)
MODES: Mapping[str, tuple[dict[str, Any], int, int, int]] = {
    "bf16": ({"bf16": {"enabled": True}}, 2, 2, 12),
    "fp32": ({}, 4, 4, 8),
}
"""Name -> config, and bytes of parameters, gradients and optimizer states for each parameter."""


def expected_bytes(mode: str, stage: int, psi: int, ranks: int) -> float:
    """Model states of one rank."""
    _, parameters, gradients, optimizer = MODES[mode]
    return psi * (
        parameters / (ranks if stage == 3 else 1)
        + gradients / (ranks if stage >= 2 else 1)
        + optimizer / ranks
    )


def gpt() -> nn.Module:
    torch.manual_seed(0)
    return TinyGPT(vocabulary=256, width=64, layers=6)


GPT = Case(gpt, tokens)
PSI = sum(p.numel() for p in gpt().parameters())


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the memory that tensors lie in; what two share counts once."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def model_states(engine: Engine) -> int:
    """Bytes of the parameters' memory and of every state's."""
    states = [f.read() for f in engine.states.fragments() if f.kind != "step"]
    return bytes_of([*states, *engine.module.parameters()])


def alive() -> int:
    """Bytes of all tensors of this process."""
    gc.collect()
    return bytes_of(o for o in gc.get_objects() if isinstance(o, torch.Tensor) and not o.is_meta)


def measure(run: Run) -> tuple[int, int]:
    """Model states between two steps, and everything beyond what was there before."""
    before = alive()
    engine = run.engine()
    for step in batches(run, engine.job.world_size):
        inputs, targets = step[0][engine.job.rank]
        engine.backward(engine(inputs, targets))
        engine.step()
    answer = model_states(engine), alive() - before
    engine.destroy()
    return answer


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("mode", list(MODES))
@pytest.mark.parametrize("world", [2, 4, 8])
def test_a_rank_keeps_what_the_paper_says(stage: int, mode: str, world: int) -> None:
    run = Run(config(stage, **MODES[mode][0]), GPT, steps=2)
    expected = expected_bytes(mode, stage, PSI, world)
    whole_gradients = 2 * 25 * 2**20 if stage < 3 else 2 * 4 * max(unit_sizes())
    for states, everything in run_distributed(measure, world, run):
        assert expected <= states <= 1.02 * expected
        assert everything <= 1.02 * expected + min(whole_gradients, 2 * 4 * PSI) + 10**5


def unit_sizes() -> list[int]:
    """Elements of each block, and of what is in none."""
    model = gpt()
    blocks = [sum(p.numel() for p in block.parameters()) for block in model.blocks]
    return [*blocks, PSI - sum(blocks)]


# -- a thousand ranks ------------------------------------------------------------------------------


class Void(HostAccelerator):
    """Makes tensors without memory, since nothing will run."""

    name = "void"

    def device(self, local_rank: int) -> torch.device:
        return torch.device("meta")


def one_of_many(stage: int, mode: str, world: int) -> tuple[int, int]:
    """Model states of one fake rank with a model of 0.2 billion parameters, and that number."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=world - 7, world_size=world)
    with torch.device("meta"):
        module = TinyGPT(vocabulary=32000, width=1024, layers=12, heads=16, positions=1024)
    settings = {**config(stage, **MODES[mode][0]), "accelerator": "void"}
    registry = Registry.installed()
    registry.add("accelerators", "void", Void)
    engine, *_ = drivetrain.initialize(model=module, config=settings, registry=registry)
    psi = sum(p.numel() for p in engine.module.parameters())
    states = model_states(engine)
    engine.destroy()
    return states, psi


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("mode", list(MODES))
def test_one_of_1024_ranks_keeps_what_the_paper_says(stage: int, mode: str) -> None:
    ((states, psi),) = run_distributed(one_of_many, 1, stage, mode, 1024)
    assert psi > 2e8
    expected = expected_bytes(mode, stage, psi, 1024)
    assert expected <= states <= 1.02 * expected


# -- traffic ---------------------------------------------------------------------------------------


def moved(run: Run) -> tuple[int, int, int]:
    """Payload of weights, gradients and all else in one step, in bytes."""
    engine = run.engine()
    accumulation = engine.gradient_accumulation_steps()
    counts = (0, 0, 0)
    for step in batches(run, engine.job.world_size):
        engine.job.byte_log.reset()
        for micro in range(accumulation):
            inputs, targets = step[micro][engine.job.rank]
            engine.backward(engine(inputs, targets))
            engine.step()
        log = engine.job.byte_log
        weights, gradients = (
            log.total(purpose=p).payload_bytes for p in (Purpose.WEIGHT, Purpose.GRADIENT)
        )
        counts = weights, gradients, log.total().payload_bytes - weights - gradients
    engine.destroy()
    return counts


@pytest.mark.parametrize("mode", list(MODES))
@pytest.mark.parametrize(
    ("stage", "accumulation", "reduction", "gathers", "reductions"),
    [
        pytest.param(1, 1, None, 1, 1, id="stage 1: 2 Psi"),
        pytest.param(2, 1, None, 1, 1, id="stage 2: 2 Psi"),
        pytest.param(3, 1, None, 2, 1, id="stage 3: 3 Psi"),
        pytest.param(1, 4, None, 1, 1, id="stage 1, accumulating: 2 Psi"),
        pytest.param(2, 4, None, 1, 4, id="stage 2, accumulating: 1 + 4 Psi"),
        pytest.param(2, 4, "boundary", 1, 1, id="stage 2, reducing at the boundary: 2 Psi"),
        pytest.param(IN_FORWARD, 1, None, 1, 1, id="gathered in forward: 2 Psi"),
        pytest.param(IN_FORWARD, 4, None, 1, 4, id="gathered in forward, accumulating: 1 + 4 Psi"),
        pytest.param(3, 4, None, 8, 4, id="stage 3, accumulating: 12 Psi"),
        pytest.param(3, 4, "boundary", 8, 1, id="stage 3, reducing at the boundary: 9 Psi"),
    ],
)
def test_a_step_moves_what_the_paper_says(
    mode: str,
    stage: Stage,
    accumulation: int,
    reduction: str | None,
    gathers: int,
    reductions: int,
) -> None:
    """In units of the parameters' bytes, also where sums in fp32 are made before anything travels.

    At stage 3 what backward needs first stays gathered after forward: the last block, and what is
    in no block; so each backward gathers that much less than Psi.
    """
    settings = config(
        stage,
        accumulation=accumulation,
        gradient_clipping=0.1,
        zero={"gradient_reduction": reduction},
        **MODES[mode][0],
    )
    width = MODES[mode][1]
    *_, last, root = unit_sizes()
    kept = accumulation * (last + root) * width if stage == 3 else 0
    for weights, gradients, rest in run_distributed(moved, 2, Run(settings, GPT, steps=2)):
        assert weights == pytest.approx(gathers * PSI * width - kept, rel=0.002)
        assert gradients == pytest.approx(reductions * PSI * width, rel=0.002)
        assert rest < 1000
