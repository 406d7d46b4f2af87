"""Models that would be computed wrongly on stages are refused, with the part and the reason."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from drivetrain_pipeline import ties
from drivetrain_pipeline.splitting.order import order_of
from torch import nn

import drivetrain
from drivetrain.contracts import SubAxis
from drivetrain.errors import ConfigError
from drivetrain.testing import RanksFailedError, run_distributed


class Block(nn.Module):
    """A layer with a child, so that it is a unit."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.linear(x))


class Model(nn.Module):
    """A loss of four blocks between two layers; subclasses do what stages cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.last = nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        result: torch.Tensor = self.last(x).square().mean()
        return result


class Around(Model):
    """What the first layer has made goes round the blocks."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = kept = self.first(x)
        for block in self.blocks:
            x = block(x)
        result: torch.Tensor = self.last(x + kept).square().mean()
        return result


class Decides(Model):
    """What comes after the blocks depends on a value of the first layer."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        sign = 1.0 if x.sum() > 0 else -1.0
        for block in self.blocks:
            x = block(x)
        result: torch.Tensor = sign * self.last(x).square().mean()
        return result


class Skips(Model):
    """The second block does not run."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for number, block in enumerate(self.blocks):
            x = x if number == 1 else block(x)
        result: torch.Tensor = self.last(x).square().mean()
        return result


class Twice(Model):
    """One block lies in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.more = nn.ModuleList([self.blocks[0], Block()])


def train(kind: type[Model], **section: str) -> None:
    engine, *_ = drivetrain.initialize(
        model=kind(),
        config={
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": 2,
            "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
            "pipeline": {"stages": 2, **section},
        },
    )
    engine.train_batch(iter([torch.ones(2, 4), torch.ones(2, 4)]))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Around, r"last takes a value of an earlier stage|depends on values of earlier stages"),
        (Decides, "decides by values of parts that are on another stage"),
        (Skips, r"unit blocks\.2 was called where blocks\.1 was expected"),
    ],
)
def test_a_model_that_stages_would_compute_wrongly_is_refused(
    kind: type[Model], reason: str
) -> None:
    with pytest.raises(RanksFailedError, match=reason):
        run_distributed(train, 2, kind)


def test_a_model_without_units_is_refused_with_what_to_do() -> None:
    with pytest.raises(ConfigError, match=r"no repeated units .*PipelineModule"):
        order_of(nn.Sequential(nn.Linear(2, 2), nn.Tanh()), {})
    with pytest.raises(ConfigError, match=r"more\.0 is the same module as blocks\.0"):
        order_of(Twice(), {})


def test_a_place_is_of_a_part_beside_the_units() -> None:
    assert order_of(Model(), {"last": "first"}).sides[1].positions == {0}
    with pytest.raises(ConfigError, match=r"pipeline\.place\.norm: .* it has first, last"):
        order_of(Model(), {"norm": "last"})


def test_a_sum_over_a_part_of_an_axis_is_not_one_over_stages() -> None:
    module = nn.Linear(2, 2, bias=False)
    info = SimpleNamespace(name="head.weight", reduction=SubAxis("dp", (0, 2)))
    job: Any = SimpleNamespace(parameters=SimpleNamespace(info=lambda _: info))
    said = r"pipeline\.stages: stages 0, 3 share parameter head\.weight, .* \(dp\[0,2\]\)"
    with pytest.raises(ConfigError, match=said):
        ties.describe(job, module, {module.weight: {3, 0}}, [])


class HalfEmpty(Model):
    """Behind two blocks with parameters come two without, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks[2:]:
            block.linear = nn.Identity()
        self.last = nn.Identity()


class HalfFrozen(Model):
    """The first two blocks, and what comes before them, are not trained."""

    def __init__(self) -> None:
        super().__init__()
        for part in (self.first, *self.blocks[:2]):
            part.requires_grad_(False)


def test_each_stage_of_a_split_model_has_parameters() -> None:
    assert [part.name for part in order_of(HalfEmpty(), {}).units] == ["blocks.0", "blocks.1"]
    run_distributed(train, 2, HalfEmpty)


def train_by_halves(kind: type[Model]) -> None:
    train(kind, partition="uniform")


def test_a_stage_that_trains_nothing_is_refused_by_its_number() -> None:
    said = "all 6 parameters of stage 0 have requires_grad=False, .* use fewer stages"
    with pytest.raises(RanksFailedError, match=said):
        run_distributed(train_by_halves, 2, HalfFrozen)
