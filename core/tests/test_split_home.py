"""A home may cut a bucket between two places that work at the same time, or update it later."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

import drivetrain
from drivetrain.contracts import BucketSpec, Fragment, Hyper, Plugin, StateHome, hookimpl
from drivetrain.engine.engine import Engine
from drivetrain.job.job import Job
from drivetrain.plan.registry import Registry
from drivetrain.states.device_home import DeviceHome
from drivetrain.testing import reference_losses, run_distributed
from drivetrain.testing.data import Samples
from drivetrain.testing.sharded import part_of

STEPS = 10
ADAMW = {"lr": 1e-2, "weight_decay": 0.1}


class SplitHome(StateHome):
    """The first part of a bucket is updated inline, the rest by a worker that takes its time."""

    def __init__(self, spec: BucketSpec, worker: ThreadPoolExecutor) -> None:
        self.spec = spec
        cut = spec.numel // 2
        self._ranges = ((0, cut), (cut, spec.numel))
        self._parts = [DeviceHome(part_of(spec, *ends)) for ends in self._ranges]
        self._worker = worker
        self._pending: Future[None] | None = None

    @property
    def step(self) -> int:
        return self._parts[0].step

    @step.setter
    def step(self, value: int) -> None:
        for part in self._parts:
            part.step = value

    def adopt(self, parameters: torch.Tensor, originals: torch.Tensor) -> None:
        for part, (start, stop) in zip(self._parts, self._ranges, strict=True):
            part.adopt(parameters[start:stop], originals[start:stop])

    def gradient_ready(self, gradient: torch.Tensor) -> None:
        pass

    def update(self, gradient: torch.Tensor, hyper: Hyper, scale: float | torch.Tensor) -> None:
        inline, later = (gradient[start:stop] for start, stop in self._ranges)
        self._pending = self._worker.submit(self._update_later, later, dict(hyper), scale)
        self._parts[0].update(inline, hyper, scale)

    def _update_later(
        self, gradient: torch.Tensor, hyper: Hyper, scale: float | torch.Tensor
    ) -> None:
        time.sleep(0.005)  # whoever does not wait for it sees old values
        self._parts[1].update(gradient, hyper, scale)

    def publish(self) -> None:
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def refresh(self) -> None:
        for part in self._parts:
            part.refresh()

    def flush(self) -> None:
        self.publish()

    def fragments(self) -> Sequence[Fragment]:
        return [fragment for part in self._parts for fragment in part.fragments()]


class SplitPlaces(Plugin):
    name = "split_places"

    @hookimpl
    def place_state(self, job: Job, specs: Sequence[BucketSpec]) -> Sequence[StateHome]:
        worker = ThreadPoolExecutor(1)
        job.on_close(worker.shutdown)
        return [SplitHome(spec, worker) for spec in specs]


class Model(nn.Module):
    """Sizes are odd, so that a cut goes through the middle of a row."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (self.layers(x).float() - y).square().mean()


def samples(step: int, rank: int) -> Samples:
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(4, 5, generator=generator), torch.randn(4, 3, generator=generator)


def make(bf16: bool, *, split: bool) -> Engine:
    engine, *_ = drivetrain.initialize(
        model=Model(),
        config={
            "train_micro_batch_size_per_gpu": 4,
            "gradient_clipping": 0.5,
            "optimizer": {"type": "AdamW", "params": ADAMW},
            "bf16": {"enabled": bf16},
            "plugins": {"split_places": True} if split else {},
            "data_parallel": {"bucket_bytes": 128, "first_bucket_bytes": 64},
        },
        registry=Registry.installed().with_plugins(SplitPlaces),
    )
    return engine


def train(engine: Engine, begin: int, end: int) -> list[float]:
    dtype = next(engine.module.parameters()).dtype
    losses = []
    for step in range(begin, end):
        x, y = samples(step, engine.job.rank)
        loss = engine(x.to(dtype), y)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def contents(engine: Engine) -> dict[str, torch.Tensor]:
    """Every state in full; fails unless the fragments cover each element exactly once."""
    whole: dict[str, torch.Tensor] = {}
    seen: dict[str, torch.Tensor] = {}
    for fragment in engine.states.fragments():
        if fragment.kind == "gradient":
            continue
        key = f"{fragment.kind} {fragment.name}"
        whole.setdefault(key, torch.zeros(fragment.global_shape))
        seen.setdefault(key, torch.zeros(fragment.global_shape))
        flat = fragment.read().detach().float()
        for box in fragment.boxes:
            box.of(whole[key]).copy_(box.of_storage(flat))
            box.of(seen[key]).add_(1)
    for key, counts in seen.items():
        assert bool((counts == 1).all()), key
    return whole


class LaterHome(DeviceHome):
    """Carries out an update when the next one is asked for, or when it is told to finish."""

    name = "later"
    _asked: tuple[torch.Tensor, Hyper, float | torch.Tensor] | None = None

    def update(self, gradient: torch.Tensor, hyper: Hyper, scale: float | torch.Tensor) -> None:
        self.flush()
        self._asked = gradient.clone(), dict(hyper), scale

    def flush(self) -> None:
        asked, self._asked = self._asked, None
        if asked is not None:
            super().update(*asked)


class LaterPlaces(Plugin):
    name = "later_places"

    @hookimpl
    def place_state(self, specs: Sequence[BucketSpec]) -> Sequence[StateHome]:
        return [LaterHome(spec) for spec in specs]


# -- functions that run on every rank --------------------------------------------------------------


def saved_while_updates_wait(folder: str) -> list[list[float]]:
    """The weight before training, and the one that a checkpoint of two steps brings back."""
    found = []
    for later in (True, False):
        module = nn.Linear(3, 1, bias=False)
        engine, *_ = drivetrain.initialize(
            model=module,
            config={
                "train_micro_batch_size_per_gpu": 1,
                "gradient_clipping": 0.0,
                "optimizer": {"type": "SGD", "params": {"lr": 0.5}},
                "plugins": {"later_places": True} if later else {},
            },
            registry=Registry.installed().with_plugins(LaterPlaces),
        )
        if later:
            found.append(module.weight.detach().flatten().tolist())
            for _ in range(2):
                engine.backward(engine(torch.tensor([[1.0, 2.0, 4.0]])).sum())
                engine.step()
            engine.save_checkpoint(folder)
        else:
            engine.load_checkpoint(folder)
            found.append(module.weight.detach().flatten().tolist())
        engine.destroy()
    return found


def train_split(bf16: bool) -> tuple[list[float], dict[str, torch.Tensor]]:
    engine = make(bf16, split=True)
    losses = train(engine, 0, STEPS)
    states = contents(engine)
    engine.destroy()
    return losses, states


def save_after_five(folder: str, bf16: bool, split: bool) -> list[float]:
    engine = make(bf16, split=split)
    train(engine, 0, 5)
    engine.save_checkpoint(folder)
    losses = train(engine, 5, STEPS)
    engine.destroy()
    return losses


def load_and_go_on(folder: str, bf16: bool, split: bool) -> list[float]:
    engine = make(bf16, split=split)
    engine.load_checkpoint(folder)
    losses = train(engine, 5, STEPS)
    engine.destroy()
    return losses


def freeze_and_thaw() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Frozen and unfrozen in one place, buckets are cut elsewhere in between."""
    engine = make(bf16=True, split=True)
    train(engine, 0, 3)
    before = contents(engine)
    engine.module.layers[2].bias.requires_grad_(False)
    engine.rebuild()
    after = contents(engine)
    engine.destroy()
    return before, after


# -- claims ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_a_split_home_trains_like_plain_torch(world: int, bf16: bool) -> None:
    model = Model()
    expected = reference_losses(
        model,
        [[samples(step, rank) for rank in range(world)] for step in range(STEPS)],
        lambda parameters: torch.optim.AdamW(parameters, **ADAMW),
        clipping=0.5,
        compute_dtype=torch.bfloat16 if bf16 else torch.float32,
    )
    answers = run_distributed(train_split, world, bf16)
    found = [sum(losses) / world for losses in zip(*(a[0] for a in answers), strict=True)]
    assert found == pytest.approx(expected, rel=2e-2 if bf16 else 1e-6)
    for _, states in answers:
        kinds = {"parameter", "exp_avg", "exp_avg_sq", "step"} | ({"master"} if bf16 else set())
        assert {key.split()[0] for key in states} == kinds
        for name, parameter in model.named_parameters():
            trained = states[f"{'master' if bf16 else 'parameter'} {name}"]
            torch.testing.assert_close(
                trained, parameter.detach(), rtol=1e-5, atol=5e-3 if bf16 else 1e-6
            )


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("saved", "loaded"), [(True, False), (False, True), (True, True)])
def test_checkpoints_go_from_split_homes_to_whole_ones_and_back(
    bf16: bool, saved: bool, loaded: bool, tmp_path: Path
) -> None:
    straight = run_distributed(save_after_five, 2, str(tmp_path), bf16, saved)
    resumed = run_distributed(load_and_go_on, 2, str(tmp_path), bf16, loaded)
    assert resumed == [pytest.approx(losses, rel=1e-6) for losses in straight]


def test_states_survive_a_rebuild_that_moves_the_cuts() -> None:
    before, after = run_distributed(freeze_and_thaw, 1)[0]
    for key, values in after.items():
        assert torch.equal(values, before[key]), key


def test_a_save_waits_for_updates_that_a_home_has_put_off(tmp_path: Path) -> None:
    before, after = run_distributed(saved_while_updates_wait, 1, str(tmp_path))[0]
    assert after == pytest.approx([b - 2 * 0.5 * g for b, g in zip(before, (1, 2, 4), strict=True)])
