"""A resumed run has the bits of an unbroken one, whatever the windows before have taught."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

import drivetrain
from drivetrain.engine.engine import Engine
from drivetrain.testing import run_distributed

STAGES = (0, 1, 2, 3)
OPTIMIZERS = ("SGD", "AdamW")


def make(stage: int, optimizer: str, *, freeze: bool = False) -> Engine:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8))
    module[0].requires_grad_(not freeze)
    return drivetrain.initialize(
        model=module,
        model_parameters=list(module.parameters()),
        config={
            "train_micro_batch_size_per_gpu": 4,
            "gradient_clipping": 0.0,
            "optimizer": {"type": optimizer, "params": {"lr": 1e-2}},
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        },
    )[0]


def run(engine: Engine, steps: range, backwards: int = 2) -> None:
    """Two backward passes a step: what the second one adds comes late, until that is known."""
    for step in steps:
        for part in range(backwards):
            seed = 100 * step + 10 * engine.job.rank + part
            x = torch.randn(4, 64, generator=torch.Generator().manual_seed(seed))
            engine.backward(engine(x).square().mean())
        engine.step()


def weights(engine: Engine) -> torch.Tensor:
    found = [value.flatten() for value in engine.module_state_dict().values()]
    engine.destroy()
    return torch.cat(found)


def differing(folder: str) -> list[str]:
    wrong = []
    for stage in STAGES:
        for optimizer in OPTIMIZERS:
            where = f"{folder}/{stage}{optimizer}"
            engine = make(stage, optimizer)
            run(engine, range(3))
            engine.save_checkpoint(where, "learned")
            run(engine, range(3, 6))
            unbroken = weights(engine)
            # 0: a new process; 1 and 2: one that has learned otherwise, or has gone too far
            for begin in range(3):
                engine = make(stage, optimizer)
                if begin == 0:
                    engine.save_checkpoint(where, "fresh")
                run(engine, range(begin), backwards=begin)
                engine.load_checkpoint(where, "learned")
                run(engine, range(3, 6))
                if not torch.equal(weights(engine), unbroken):
                    wrong.append(f"stage {stage}, {optimizer}, {begin} steps before")
            engine = make(stage, optimizer)
            run(engine, range(2))
            engine.load_checkpoint(where, "fresh")  # which forgets what was learned
            run(engine, range(6))
            if not torch.equal(weights(engine), unbroken):
                wrong.append(f"stage {stage}, {optimizer}, loaded from the beginning")
    return wrong


def test_late_buckets_are_added_up_as_in_an_unbroken_run(tmp_path: Path) -> None:
    assert run_distributed(differing, 2, str(tmp_path)) == [[], []]


def off_after_unfreezing(folder: str) -> list[float]:
    """How far weights of a run resumed after a parameter was unfrozen are from an unbroken one."""
    found = []
    for stage in STAGES:
        engine = make(stage, "AdamW", freeze=True)
        run(engine, range(3))
        engine.module[0].requires_grad_(True)
        engine.rebuild()
        run(engine, range(3, 5))
        engine.save_checkpoint(f"{folder}/{stage}")
        run(engine, range(5, 7))
        unbroken = weights(engine)
        engine = make(stage, "AdamW")  # where all parameters share a bucket
        engine.load_checkpoint(f"{folder}/{stage}")
        run(engine, range(5, 7))
        found.append(float((weights(engine) - unbroken).abs().max()))
    return found


def test_parameters_that_were_unfrozen_keep_their_own_count_of_updates(tmp_path: Path) -> None:
    assert run_distributed(off_after_unfreezing, 2, str(tmp_path)) == [[0.0] * 4] * 2
