"""What scripts change behind the engine's back: as in plain torch, or refused by name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import drivetrain
from drivetrain.engine.engine import Engine
from drivetrain.errors import TrainingError
from drivetrain.testing import run_distributed

WIDTH, RANKS, RATE = 6, 2, 0.1


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.body(x)))


class Words(nn.Module):
    """Its forward rescales the rows that it uses."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(8, WIDTH, max_norm=0.5)
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.words((x[:, 0].abs() * 10).long() % 8))


class Clipped(Net):
    """Its forward changes a weight, on every rank in the same way."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.head.weight.clamp_(-0.2, 0.2)
        return super().forward(x)


def seeded(kind: type[nn.Module] = Net) -> nn.Module:
    torch.manual_seed(3)
    return kind()


def config(stage: int, **changes: Any) -> dict[str, Any]:
    zero = {"stage": stage, "stage3_param_persistence_threshold": changes.pop("kept", 0)}
    return {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 0.0,
        "optimizer": {"type": "SGD", "params": {"lr": RATE}},
        "steps_per_print": 0,
        **({"zero_optimization": zero} if stage else {}),
        **changes,
    }


def batch(step: int, rank: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(10 * step + rank)
    return torch.randn(4, WIDTH, generator=generator)


def backward(engine: Engine, step: int) -> None:
    x = batch(step, engine.job.rank).to(next(engine.module.parameters()).dtype)
    engine.backward(engine(x).float().square().mean())


def assert_like(engine: Engine, reference: nn.Module) -> None:
    found = engine.module_state_dict()
    for name, wanted in reference.state_dict().items():
        torch.testing.assert_close(
            found[name], wanted, msg=lambda text, name=name: f"{name} {text}"
        )


def trains_as_plain_torch(
    stage: int, change: Callable[[nn.Module], object], kind: type[nn.Module] = Net
) -> None:
    engine = drivetrain.initialize(model=seeded(kind), config=config(stage))[0]
    reference = seeded(kind)
    for step in range(3):
        backward(engine, step)
        if step == 1:
            change(engine.module)  # between backward and step
        engine.step()
        change(engine.module)
        reference_step(reference, step, change if step == 1 else None, engine.job.world_size)
        change(reference)
    engine.states.fragments()  # show what is trained
    assert_like(engine, reference)
    engine.destroy()
    engine.job.close()


def reference_step(
    module: nn.Module, step: int, change: Callable[[nn.Module], object] | None, ranks: int
) -> None:
    optimizer = torch.optim.SGD(module.parameters(), lr=RATE)
    optimizer.zero_grad()
    for rank in range(ranks):
        (module(batch(step, rank)).square().mean() / ranks).backward()
    if change is not None:
        change(module)
    optimizer.step()


def refuses(
    stage: int,
    change: Callable[[Engine], object],
    words: str,
    *,
    kind: type[nn.Module] = Net,
    **changes: Any,
) -> None:
    """The step, or the save, after ``change`` is refused on every rank."""
    engine = drivetrain.initialize(model=seeded(kind), config=config(stage, **changes))[0]

    def goes_on() -> None:
        backward(engine, 0)
        engine.step()  # a forward may have changed something
        change(engine)
        engine.states.fragments()
        backward(engine, 1)
        engine.step()

    with pytest.raises(TrainingError, match=words):
        goes_on()
    engine.destroy()
    engine.job.close()


# -- values ----------------------------------------------------------------------------------------


def reassigned(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.data = parameter.data.clamp(-0.2, 0.2)


def reassigned_transposed(module: nn.Module) -> None:
    module.body[0].weight.data = module.body[0].weight.data.t()


def in_place(module: nn.Module) -> None:
    with torch.no_grad():
        module.head.weight.mul_(0.5)


def in_place_through_data(module: nn.Module) -> None:
    module.head.weight.data.mul_(0.5)


def moved_and_back(module: nn.Module) -> None:
    module.double()
    module.float()


def nothing(_: object) -> None:
    pass


class Halved(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight / 2


def parametrized(module: nn.Module) -> None:
    if not parametrize.is_parametrized(module.head):
        parametrize.register_parametrization(module.head, "weight", Halved())


def kept_as_in_plain_torch() -> None:
    for stage in (0, 1, 2):
        changes = [reassigned, reassigned_transposed, in_place, in_place_through_data]
        for change in [*changes, moved_and_back, parametrized]:
            trains_as_plain_torch(stage, change)
        trains_as_plain_torch(stage, nothing, Clipped)


def test_changed_values_are_those_that_are_trained() -> None:
    run_distributed(kept_as_in_plain_torch, RANKS)


def rescaled_alone() -> None:
    for stage in (0, 1, 2, 3):
        trains_as_plain_torch(stage, nothing, Words)


def test_a_forward_that_rescales_weights_is_right_on_one_rank() -> None:
    run_distributed(rescaled_alone, 1)


# -- refused ---------------------------------------------------------------------------------------


def of_module(change: Callable[[nn.Module], object]) -> Callable[[Engine], object]:
    return lambda engine: change(engine.module)


def resized(module: nn.Module) -> None:
    module.head.bias.data = torch.zeros(1)


def replaced(module: nn.Module) -> None:
    module.head = nn.Linear(WIDTH, 2)


def added(module: nn.Module) -> None:
    module.extra = nn.Linear(2, 2)


def added_frozen(module: nn.Module) -> None:
    module.extra = nn.Linear(2, 2).requires_grad_(False)


def inserted(module: nn.Module) -> None:
    module.body.insert(1, nn.Linear(WIDTH, WIDTH))


def removed(module: nn.Module) -> None:
    module.body[2] = nn.Identity()


def assigned(module: nn.Module) -> None:
    module.load_state_dict(seeded().state_dict(), assign=True)


def weight_normed(module: nn.Module) -> None:
    parametrizations.weight_norm(module.head)


def regrouped(engine: Engine) -> None:
    engine.optimizer.param_groups[0]["params"].pop()


def regrouped_all(engine: Engine) -> None:
    engine.optimizer.param_groups[0] = {**engine.optimizer.param_groups[0], "lr": 7.0}


def of_one_rank(engine: Engine) -> None:
    if engine.job.rank == 1:
        in_place(engine.module)


LAYOUT = [
    (of_module(replaced), "parameter head.weight was put into the model after"),
    (of_module(added), "parameter extra.weight was put into the model after"),
    (of_module(added_frozen), "parameter extra.weight was put into the model after"),
    (of_module(inserted), "was put into the model after"),
    (of_module(removed), r"parameter body\.2\.\w+ was taken out of the model after"),
    (of_module(assigned), "was put into the model after"),
    (of_module(weight_normed), "was put into the model after"),
    (regrouped, "parameter .* was moved between the optimizer's groups"),
    (regrouped_all, "optimizer.param_groups"),
]
BF16 = {"bf16": {"enabled": True}}


def refused_by_name(stage: int) -> None:
    for change, words in LAYOUT:
        refuses(stage, change, words)
    if stage == 3:
        outside = r"parameter [\w.]+ was changed outside of drivetrain.whole\(\)"
        refuses(3, of_module(reassigned), outside)
        refuses(3, of_module(reassigned), outside, kept=10**6)
        refuses(3, of_module(in_place), outside, kept=10**6)
        refuses(3, nothing, outside, kind=Words)
        refuses(3, nothing, outside, kind=Clipped)
        return
    refuses(stage, of_module(resized), "head.bias was resized")
    refuses(stage, of_module(reassigned), "was changed in place", **BF16)
    refuses(stage, of_module(in_place), "was changed in place", **BF16)
    refuses(stage, nothing, "words.weight was changed to different values", kind=Words)
    refuses(stage, of_one_rank, "head.weight was changed to different values")


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_what_would_go_wrong_in_silence_is_refused_by_name(stage: int) -> None:
    run_distributed(refused_by_name, RANKS, stage)


def shown_elsewhere() -> None:
    for stage in (0, 1, 2):
        engine = drivetrain.initialize(model=seeded(), config=config(stage, **BF16))[0]
        other = drivetrain.initialize(model=copy.deepcopy(seeded()), config=config(stage, **BF16))[
            0
        ]
        for step in range(2):
            for each in (engine, other):
                backward(each, step)
                each.step()
            for parameter in engine.module.parameters():
                parameter.data = parameter.data.clone()
        backward(engine, 2), backward(other, 2)
        engine.step(), other.step()
        for mine, theirs in zip(engine.module.parameters(), other.module.parameters(), strict=True):
            assert torch.equal(mine, theirs)
        engine.job.close()


def test_the_same_values_elsewhere_are_no_change_of_masters() -> None:
    run_distributed(shown_elsewhere, RANKS)
