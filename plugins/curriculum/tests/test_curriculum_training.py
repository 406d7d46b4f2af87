"""What the model sees of a curriculum, in training, in evaluation and after a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from drivetrain_curriculum import Curriculum, current_difficulty, set_schedule
from torch import nn

import drivetrain
from drivetrain.errors import ConfigError, TrainingError
from drivetrain.plan.registry import Registry
from drivetrain.testing import data, reference_losses, run_distributed
from drivetrain.testing.models import tiny_gpt

LINEAR = {
    "enabled": True,
    "min_difficulty": 4,
    "max_difficulty": 16,
    "schedule_type": "fixed_linear",
    "schedule_config": {"total_curriculum_step": 4, "difficulty_step": 4},
}
LENGTHS = [4, 8, 12, 16, 16]
"""4 + 12 t / 4 = 7, 10, 13, 16, rounded down to multiples of 4."""


class Recorder(nn.Module):
    """Remembers how it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.seen: list[Any] = []

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.seen.append((args, kwargs))
        return self.weight.sum()


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.weight.sum()


def start(model: nn.Module, section: dict[str, Any], **keys: Any) -> drivetrain.Engine:
    config = {
        "train_batch_size": 4,
        "gradient_clipping": 0.0,
        "optimizer": {"type": "SGD", "params": {"lr": 0.5}},
        "curriculum_learning": section,
        **keys,
    }
    engine, *_ = drivetrain.initialize(
        model=model, config=config, registry=Registry.installed().with_plugins(Curriculum)
    )
    return engine


def steps(engine: drivetrain.Engine, number: int) -> None:
    for _ in range(number):
        engine.backward(engine(torch.zeros(4, 16, dtype=torch.long)))
        engine.step()


def lengths(engine: drivetrain.Engine) -> list[int]:
    return [kwargs["curriculum_seqlen"] for _, kwargs in engine.module.seen]


def train_gpt() -> dict[str, Any]:
    engine = start(tiny_gpt(), {**LINEAR, "truncate": True})
    losses = []
    inputs, targets = data.tokens(20)
    share = engine.train_micro_batch_size_per_gpu()
    for step in range(5):
        begin = 4 * step + share * engine.job.rank
        rows = slice(begin, begin + share)
        losses.append(float(engine.train_batch(iter([(inputs[rows], targets[rows])]))))
    answer = {"losses": losses, "tokens": engine.progress.tokens}
    engine.destroy()
    return answer


@pytest.mark.parametrize("world", [1, 2])
def test_cutting_here_trains_like_cutting_by_hand(world: int) -> None:
    inputs, targets = data.tokens(20)
    batches = [
        [(inputs[4 * i : 4 * i + 4, :length], targets[4 * i : 4 * i + 4, :length])]
        for i, length in enumerate(LENGTHS)
    ]
    expected = reference_losses(tiny_gpt(), batches, lambda p: torch.optim.SGD(p, lr=0.5))
    for answer in run_distributed(train_gpt, world):
        assert answer["losses"] == pytest.approx(expected, rel=1e-6)
        assert answer["tokens"] == 4 * sum(LENGTHS)


def test_the_model_gets_the_length_of_its_step_and_cuts_by_itself() -> None:
    engine = start(Recorder(), LINEAR, train_batch_size=8, gradient_accumulation_steps=2)
    steps(engine, 10)
    assert lengths(engine) == [length for length in LENGTHS for _ in range(2)]
    assert all(args[0].shape == (4, 16) for args, _ in engine.module.seen)
    assert current_difficulty(engine) == 16
    engine.destroy()


def test_evaluation_sees_whole_sequences() -> None:
    for section in (LINEAR, {**LINEAR, "truncate": True}):
        engine = start(Recorder(), section)
        engine.eval()
        engine(torch.zeros(4, 16, dtype=torch.long))
        [(args, kwargs)] = engine.module.seen
        assert args[0].shape == (4, 16)
        assert kwargs == {}
        engine.destroy()


def test_every_tensor_along_the_sequence_is_cut_and_no_other() -> None:
    engine = start(Recorder(), {**LINEAR, "truncate": True})
    tokens = torch.arange(64).view(4, 16)
    engine(tokens, {"embedded": torch.zeros(4, 16, 3), "classes": torch.zeros(4)}, mask=tokens > 7)
    [(args, kwargs)] = engine.module.seen
    assert torch.equal(args[0], tokens[:, :4])
    assert args[1]["embedded"].shape == (4, 4, 3)
    assert args[1]["classes"].shape == (4,)
    assert torch.equal(kwargs["mask"], tokens[:, :4] > 7)
    engine.destroy()


def test_inputs_without_a_sequence_cannot_be_cut() -> None:
    engine = start(Recorder(), {**LINEAR, "truncate": True})
    with pytest.raises(TrainingError, match="no input is a two-dimensional tensor of integers"):
        engine(torch.zeros(4, 16))
    engine.destroy()


def test_a_model_that_cannot_take_the_keyword_is_refused() -> None:
    engine = start(Plain(), LINEAR)
    with pytest.raises(ConfigError, match=r"the forward of Plain does not take curriculum_seqlen"):
        steps(engine, 1)
    engine.destroy()


CUSTOM = {**LINEAR, "schedule_type": "custom", "schedule_config": {}}


def test_a_function_of_the_step_decides() -> None:
    engine = start(Recorder(), CUSTOM)
    set_schedule(engine, lambda step: 4 + step)
    steps(engine, 3)
    assert lengths(engine) == [5, 6, 7]
    engine.destroy()


def test_a_fixed_schedule_cannot_be_replaced() -> None:
    engine = start(Recorder(), LINEAR)
    with pytest.raises(TrainingError, match="with schedule_type custom"):
        set_schedule(engine, lambda step: 1)
    engine.destroy()


def test_without_a_curriculum_there_is_no_difficulty() -> None:
    engine = start(Recorder(), {"enabled": False})
    steps(engine, 1)
    assert current_difficulty(engine) is None
    engine.destroy()


def test_a_resume_keeps_the_difficulty_that_was_reached(tmp_path: Path) -> None:
    engine = start(Recorder(), CUSTOM)
    set_schedule(engine, lambda step: 16 if step == 2 else 8)
    steps(engine, 3)
    assert lengths(engine) == [8, 16, 16]
    engine.save_checkpoint(str(tmp_path))
    engine.destroy()
    engine = start(Recorder(), CUSTOM)
    engine.load_checkpoint(str(tmp_path))
    assert current_difficulty(engine) == 16
    set_schedule(engine, lambda step: 8)
    steps(engine, 1)
    assert lengths(engine) == [16]
    engine.destroy()


def test_a_fixed_schedule_goes_on_after_a_resume(tmp_path: Path) -> None:
    engine = start(Recorder(), LINEAR)
    steps(engine, 2)
    engine.save_checkpoint(str(tmp_path))
    engine.destroy()
    engine = start(Recorder(), LINEAR)
    engine.load_checkpoint(str(tmp_path))
    steps(engine, 3)
    assert lengths(engine) == LENGTHS[2:]
    engine.destroy()
