"""What a module draws in training comes from the job's stream "dropout", whoever repeats it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import drivetrain
from drivetrain.contracts import (
    Atom,
    AxisRequest,
    Plugin,
    PositiveInt,
    Section,
    Sections,
    hookimpl,
)
from drivetrain.engine.engine import Engine
from drivetrain.errors import TrainingError
from drivetrain.plan.registry import Registry
from drivetrain.testing import run_distributed

WIDTH = 64


class Masks(nn.Module):
    """Answers what dropout leaves of its weights."""

    def __init__(self, how: str | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))
        self.drop = nn.Dropout(0.5)
        self.how = how

    def forward(self) -> torch.Tensor:
        if self.how is None:
            return self.block(self.weight)
        repeated: torch.Tensor = checkpoint(
            self.block, self.weight, use_reentrant=self.how == "re-entrant"
        )
        return repeated

    def block(self, weight: torch.Tensor) -> torch.Tensor:
        return self.drop(torch.tanh(self.drop(weight)))


class ToyTensorSection(Section):
    tp: PositiveInt = 1


class ToyTensor(Plugin):
    """An axis along which ranks hold the same activations."""

    name = "toy_tensor"
    sections: ClassVar[Sections] = {"toy_tensor": ToyTensorSection}

    @hookimpl
    def mesh_axes(self) -> Sequence[AxisRequest]:
        return [Atom("tp", self.section(ToyTensorSection).tp)]


def make(module: nn.Module | None = None, **keys: Any) -> Engine:
    engine, *_ = drivetrain.initialize(
        model=module or Masks(),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "gradient_clipping": 0.0,
            "optimizer": {"type": "SGD", "params": {"lr": 0.125}},
            "toy_tensor": {},
            **keys,
        },
        registry=Registry.installed().with_plugins(ToyTensor),
    )
    return engine


def kept(engine: Engine) -> list[bool]:
    return (engine().detach() != 0).tolist()


def two_masks(keys: dict[str, Any]) -> list[list[bool]]:
    torch.manual_seed(0)  # the same on all ranks, as scripts do for equal weights
    engine = make(**keys)
    found = [kept(engine), kept(engine)]
    engine.destroy()
    return found


def test_masks_differ_between_data_ranks_and_agree_between_tensor_ranks() -> None:
    keys = {"toy_tensor": {"tp": 2}}
    first, second, third, fourth = run_distributed(two_masks, 4, keys)  # rank = 2 dp + tp
    assert first == second
    assert third == fourth
    masks = [mask for masks in (first, third) for mask in masks]
    assert len({tuple(mask) for mask in masks}) == 4


def test_masks_are_those_that_the_stream_draws() -> None:
    engine = make()
    generator = torch.Generator()
    generator.set_state(engine.job.random.generator("dropout").get_state())
    found = engine().detach()
    torch.manual_seed(0)
    torch.set_rng_state(generator.get_state())
    module = Masks()
    assert torch.equal(module(), found)
    engine.destroy()


def test_the_seed_of_the_config_decides_and_not_that_of_torch() -> None:
    found = []
    for seed, torch_seed in ((1, 0), (1, 5), (2, 0)):
        engine = make(seed=seed)
        torch.manual_seed(torch_seed)
        found.append(kept(engine))
        engine.destroy()
    assert found[0] == found[1] != found[2]


def test_draws_of_the_script_and_of_the_module_leave_each_other_alone() -> None:
    engine = make()
    quiet = [kept(engine) for _ in range(3)]
    engine.destroy()
    torch.manual_seed(3)
    expected = torch.rand(3).tolist()
    torch.manual_seed(3)
    engine = make()
    noisy, numbers = [], []
    for _ in range(3):
        numbers.append(torch.rand(1).item())
        noisy.append(kept(engine))
    engine.destroy()
    assert noisy == quiet
    assert numbers == expected


def test_evaluation_draws_nothing_from_the_stream() -> None:
    class Noise(Masks):
        def forward(self) -> torch.Tensor:
            return self.weight + torch.rand(WIDTH)

    engine = make(Noise())
    before = engine.job.random.generator("dropout").get_state()
    engine.eval()
    torch.manual_seed(4)
    assert torch.equal(engine().detach(), 1 + torch.rand(WIDTH, generator=_seeded(4)))
    assert torch.equal(engine.job.random.generator("dropout").get_state(), before)
    engine.destroy()


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("how", ["re-entrant", "saved"])
def test_a_recomputed_forward_has_the_same_masks(how: str) -> None:
    """The gradient is 0 where the weight was dropped, and nowhere else."""
    engine = make(Masks(how))
    for _ in range(3):
        before = engine.module.weight.detach().clone()
        output = engine()
        torch.rand(5)  # between forward and recomputation
        engine.backward(output.sum())
        engine.step()
        moved = engine.module.weight.detach() != before
        assert torch.equal(moved, output.detach() != 0)
    engine.destroy()


@pytest.mark.parametrize("how", ["re-entrant", "saved"])
def test_a_checkpoint_around_the_engine_is_refused_where_it_cannot_repeat_dropout(how: str) -> None:
    for rate, refused in ((0.5, True), (0.0, False)):
        engine = make()
        engine.module.drop.p = rate
        x = torch.ones(1, requires_grad=True)
        output = checkpoint(lambda x, e=engine: x * e(), x, use_reentrant=how == "re-entrant")
        if refused:
            with pytest.raises(TrainingError, match=r"inside the module, not around the engine"):
                engine.backward(output.sum())
        else:
            engine.backward(output.sum())
        engine.destroy()


def test_an_engine_inside_of_another_goes_on_with_the_stream() -> None:
    inner = make()

    class Outer(Masks):
        def forward(self) -> torch.Tensor:
            first = self.drop(self.weight)
            return torch.stack([first, inner(), self.drop(self.weight)])

    engine = inner.job.engine(Outer())
    rows = [tuple(row) for row in (engine().detach() != 0).tolist()]
    assert len(set(rows)) == 3
    engine.destroy()
    inner.destroy()


def test_an_error_in_forward_leaves_the_script_its_generator() -> None:
    class Fails(Masks):
        def forward(self) -> torch.Tensor:
            torch.rand(1)
            raise ValueError

    engine = make(Fails())
    before = torch.get_rng_state()
    with pytest.raises(ValueError):
        engine()
    assert torch.equal(torch.get_rng_state(), before)
    engine.destroy()


def masks_after_resume(folder: str, save: bool) -> list[list[bool]]:
    torch.manual_seed(1)
    engine = make()
    if not save:
        engine.load_checkpoint(folder, "t")
    else:
        for _ in range(3):
            engine.backward(engine().sum())
            engine.step()
        engine.save_checkpoint(folder, "t")
    found = [kept(engine) for _ in range(2)]
    engine.destroy()
    return found


def test_masks_go_on_after_a_checkpoint(tmp_path: Path) -> None:
    straight = run_distributed(masks_after_resume, 2, str(tmp_path), True)
    assert run_distributed(masks_after_resume, 2, str(tmp_path), False) == straight
    assert straight[0] != straight[1]
