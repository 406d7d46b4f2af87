"""Compiled units under ZeRO: hooks stay outside of graphs, and training is as without."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

import drivetrain
from drivetrain.testing import data, models, run_distributed
from drivetrain.testing.reference import reference_losses

STEPS = 4


def check_compiled(stage: int) -> tuple[list[float], dict, int]:
    torch._dynamo.reset()
    counters.clear()
    config = {
        "train_batch_size": 4,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.01}},
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }
    engine, *_ = drivetrain.initialize(model=models.tiny_gpt(), config=config)
    engine.compile(backend="aot_eager")
    inputs, targets = data.tokens(4 * STEPS)
    losses = []
    for step in range(STEPS):
        at = 4 * step + 2 * engine.job.rank
        loss = engine(inputs[at : at + 2], targets[at : at + 2])
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    breaks, graphs = dict(counters["graph_break"]), counters["stats"]["unique_graphs"]
    torch._dynamo.reset()
    return losses, breaks, graphs


@pytest.mark.parametrize("stage", [2, 3])
def test_compiled_units_train_like_plain_torch_without_graph_breaks(stage: int) -> None:
    answers = run_distributed(check_compiled, 2, stage, timeout=300)
    ours = [sum(step) / 2 for step in zip(*(losses for losses, _, _ in answers), strict=True)]
    inputs, targets = data.tokens(4 * STEPS)
    parts = [(inputs[i : i + 2], targets[i : i + 2]) for i in range(0, 4 * STEPS, 2)]
    expected = reference_losses(
        models.tiny_gpt(),
        [parts[i : i + 2] for i in range(0, 2 * STEPS, 2)],
        lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
    )
    assert ours == pytest.approx(expected, rel=1e-5)
    for _, breaks, graphs in answers:
        assert breaks == {}
        assert graphs == 1  # both blocks share it
