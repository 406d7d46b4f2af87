"""One rank that runs a pass more than the others is right, or all end and say in what."""

from __future__ import annotations

from datetime import timedelta
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn

import drivetrain
from drivetrain.testing import run_distributed
from drivetrain.testing.distributed import RanksFailedError

GLOO = {"DRIVETRAIN_DISABLE_PLUGINS": "drivetrain-cpu"}
EXTRAS = ("backward of a part", "backward", "derivative", "forward")
UNITS = {"stage": 3, "stage3_param_persistence_threshold": 0}
WAYS: list[dict[str, Any]] = [{"stage": 1}, {"stage": 2}, UNITS]


def model() -> nn.Module:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(2)]
    return nn.Sequential(*blocks, nn.Linear(4, 1))


def more(kind: str, module: nn.Module, backward: Any) -> None:
    x = torch.ones(1, 4)
    if kind == "backward of a part":
        backward(module[2](x).sum())
    elif kind == "backward":
        backward(module(x).sum())
    elif kind == "derivative":
        x.requires_grad_()
        torch.autograd.grad(module(x).sum(), x)
    else:
        module(x)


def by_engine(zero: dict[str, Any], kind: str) -> dict[str, torch.Tensor]:
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "zero_optimization": zero,
    }
    engine, *_ = drivetrain.initialize(model=model(), config=config)
    with patch("drivetrain.communication.torch_communicator.LONG", timedelta(seconds=0.2)):
        for _ in range(2):
            engine.backward(engine(torch.ones(1, 4)).sum())
            if engine.job.rank == 0:
                more(kind, engine.module, lambda loss: loss.backward())
            engine.step()
        found = {name: value.clone() for name, value in engine.module_state_dict().items()}
    engine.destroy()
    return found


def by_torch(kind: str) -> dict[str, torch.Tensor]:
    module = model()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        module(torch.ones(1, 4)).sum().backward()
        more(kind, module, lambda loss: (loss / 2).backward())
        optimizer.step()
    return module.state_dict()


def right_ones() -> None:
    """What ranks do not have to do together."""
    cases = [(WAYS[0], kind) for kind in EXTRAS] + [(WAYS[1], kind) for kind in EXTRAS[2:]]
    for zero, kind in cases:
        found = by_engine(zero, kind)
        for name, value in by_torch(kind).items():
            torch.testing.assert_close(found[name], value)


def test_one_rank_may_do_more_where_no_other_takes_part() -> None:
    run_distributed(right_ones, 2, env=GLOO)


@pytest.mark.parametrize(
    ("zero", "kind"),
    [(WAYS[1], EXTRAS[0]), (WAYS[1], EXTRAS[1]), (WAYS[2], EXTRAS[2]), (WAYS[2], EXTRAS[3])],
    ids=lambda value: value if isinstance(value, str) else f"stage {value['stage']}",
)
def test_elsewhere_all_ranks_end_and_say_what_they_wait_in(zero: dict[str, Any], kind: str) -> None:
    with pytest.raises(RanksFailedError) as caught:
        run_distributed(by_engine, 2, zero, kind, env=GLOO, timeout=60)
    assert set(caught.value.errors) == {0, 1}
    for error in caught.value.errors.values():
        assert "ranks are in different collectives: rank" in error.error
