"""Models cut over ranks train as they do whole: plain SGD in float64, without any plugin."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensor_models import MODELS, ROWS, build, loss_of, reference

import drivetrain
from drivetrain.engine.engine import Engine
from drivetrain.testing import run_distributed

STEPS = 3


def make(model: torch.nn.Module, tp: int, **section: Any) -> Engine:
    engine, *_ = drivetrain.initialize(
        model=model,
        config={
            "train_micro_batch_size_per_gpu": ROWS,
            "gradient_clipping": 0,
            "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
            "tensor_parallel": {"autotp_size": tp, **section},
        },
    )
    return engine


def train(engine: Engine, steps: int = STEPS) -> list[float]:
    losses = []
    for step in range(steps):
        loss = loss_of(engine, step)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def full(engine: Engine) -> dict[str, torch.Tensor]:
    """The client's whole tensors."""
    found = {}
    for parameter in engine.module.parameters():
        with drivetrain.whole([parameter]):
            found[engine.job.parameters.info(parameter).name] = parameter.detach().clone()
    return found


def trained(name: str, section: dict[str, Any]) -> tuple[list[float], dict[str, Any], int]:
    engine = make(build(name), 2, **section)
    losses = train(engine)
    parameters = full(engine)
    cut = sum(
        engine.job.parameters.info(p).placement is not None for p in engine.module.parameters()
    )
    engine.destroy()
    return losses, parameters, cut


def every(names: list[str], section: dict[str, Any]) -> dict[str, Any]:
    return {name: trained(name, section) for name in names}


@pytest.mark.parametrize("section", [{}, {"tp_overlap_comm": True, "vocabulary": False}])
def test_a_cut_model_trains_as_the_whole_one(section: dict[str, Any]) -> None:
    for results in run_distributed(every, 2, list(MODELS), section):
        for name, (losses, parameters, cut) in results.items():
            model = build(name)
            assert losses == pytest.approx(reference(model, STEPS), rel=1e-9), name
            assert cut >= 8, name
            for path, expected in model.named_parameters():
                found = parameters.get(path)
                assert found is not None, (name, path)
                assert torch.allclose(found, expected, rtol=1e-8, atol=1e-10), (name, path)
