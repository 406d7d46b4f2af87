"""Each planted bug is found in its first step, with the right parameter; clean runs pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import drivetrain
from drivetrain.contracts import BucketView, Hyper
from drivetrain.engine.engine import Engine
from drivetrain.errors import TrainingError
from drivetrain.optimization.torch_rule import TorchRule
from drivetrain.states import gradient_norm
from drivetrain.states.all_reduce import AllReduceBucket
from drivetrain.states.device_home import DeviceHome
from drivetrain.testing import RanksFailedError, run_distributed

WIDTH = 6


class Model(nn.Module):
    """Dropout, a re-entrant checkpoint whose layer is also used outside, and a parameter alone."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.shared = nn.Linear(4, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norm, self.dropout = nn.LayerNorm(WIDTH), nn.Dropout(0.3)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.shared(self.first(x)))
        x = checkpoint(lambda y: torch.tanh(self.shared(y)), x, use_reentrant=True)
        return self.head(self.dropout(self.norm(x)))


def trained(keys: dict[str, Any], plant: Callable[[], Any] | None, steps: int = 4) -> Any:
    with ExitStack() as stack:
        engine = drivetrain.initialize(
            model=Model(),
            config={
                "train_micro_batch_size_per_gpu": 3,
                "gradient_accumulation_steps": 2,
                "gradient_clipping": 0.0,
                "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "betas": [0.8, 0.95]}},
                "data_parallel": {"bucket_bytes": 128, "first_bucket_bytes": 64},
                "verify": {"steps": 3},
                **keys,
            },
        )[0]
        if plant is not None:
            stack.enter_context(plant())
        rank = engine.job.rank
        for step in range(steps):
            for micro in range(2):
                generator = torch.Generator().manual_seed(100 * step + 10 * micro + rank)
                x = torch.randn(3, 4, generator=generator).to(engine.module.head.weight.dtype)
                scores = engine(x)
                scores = scores.float()
                engine.backward((scores.square().sum(1) * 0.1 + scores.sum(1)).mean())
                engine.step()
        from drivetrain_verify.work import _works

        shown = _works[engine.job].verdict.data()
        engine.destroy()
        return shown


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"gradient_clipping": 0.1},
        {"optimizer": {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}}},
        {"optimizer": {"type": "Adam", "params": {"lr": 0.01, "adam_w_mode": False}}},
        {"bf16": {"enabled": True}},
        {"fp16": {"enabled": True, "initial_scale_power": 10}},
        {"torch_autocast": {"enabled": True}},
        {"gradient_allreduce_op": "sum"},
    ],
    ids=str,
)
def test_a_right_plan_agrees_within_rounding(keys: dict[str, Any]) -> None:
    shown = run_distributed(trained, 2, keys, None)[0]
    assert shown["steps"] == 3
    assert {found["kind"] for found in shown["worst"]} == {"gradient", "weight"}
    assert len(shown["worst"]) == 2 * len(list(Model().parameters()))
    assert all(0 <= found["share"] <= 1 for found in shown["worst"])


# -- bugs ------------------------------------------------------------------------------------------


def wrong_divisor() -> Any:
    right = Engine.gradient_divisor
    return patch.object(Engine, "gradient_divisor", lambda self: 2 * right(self))


def missed_accumulation() -> Any:
    right = AllReduceBucket.add

    def add(self: AllReduceBucket, slot: Any, gradient: torch.Tensor) -> None:
        slot.filled = slot.filled and slot.name != "head.weight"
        right(self, slot, gradient)

    return patch.object(AllReduceBucket, "add", add)


def late_gradient_lost() -> Any:
    return patch.object(AllReduceBucket, "add_late", lambda self: None)


def swapped_betas() -> Any:
    right = TorchRule.update

    def update(self: TorchRule, bucket: BucketView, hyper: Hyper, scale: Any) -> None:
        right(self, bucket, {**hyper, "betas": tuple(reversed(hyper["betas"]))}, scale)

    return patch.object(TorchRule, "update", update)


def no_weight_decay() -> Any:
    right = TorchRule.update

    def update(self: TorchRule, bucket: BucketView, hyper: Hyper, scale: Any) -> None:
        right(self, bucket, {**hyper, "weight_decay": 0.0}, scale)

    return patch.object(TorchRule, "update", update)


def norm_counted_twice() -> Any:
    right = gradient_norm.sum_of_squares
    return patch.object(gradient_norm, "sum_of_squares", lambda *a: 4 * right(*a))


def not_summed_over_ranks() -> Any:
    return patch.object(AllReduceBucket, "_sum", lambda self, gradient: None)


@contextmanager
def one_bucket_is_not_updated() -> Iterator[None]:
    right = DeviceHome.update

    def update(self: DeviceHome, gradient: torch.Tensor, *rest: Any) -> None:
        if not any(segment.name == "norm.bias" for segment in self.spec.segments):
            right(self, gradient, *rest)

    with patch.object(DeviceHome, "update", update):
        yield


@contextmanager
def one_element_is_wrong() -> Iterator[None]:
    right = AllReduceBucket.add

    def add(self: AllReduceBucket, slot: Any, gradient: torch.Tensor) -> None:
        if slot.name == "first.bias":
            gradient = gradient.clone()
            gradient[2] *= 1.001
        right(self, slot, gradient)

    with patch.object(AllReduceBucket, "add", add):
        yield


@contextmanager
def step_counted_twice() -> Iterator[None]:
    right = DeviceHome.update

    def update(self: DeviceHome, *rest: Any) -> None:
        self.step += 1
        right(self, *rest)

    with patch.object(DeviceHome, "update", update):
        yield


SGD = {"optimizer": {"type": "SGD", "params": {"lr": 0.1}}}
DECAYED = {"optimizer": {"type": "AdamW", "params": {"lr": 0.01, "weight_decay": 0.5}}}


@pytest.mark.parametrize(
    ("plant", "keys", "words"),
    [
        (wrong_divisor, SGD, r"the update of parameter first\.weight in step 1"),
        (missed_accumulation, {}, r"the gradient of parameter head\.weight in step 1"),
        (late_gradient_lost, {}, r"the gradient of parameter shared\.weight in step 1"),
        (swapped_betas, {}, r"the update of parameter first\.weight in step 2"),
        (no_weight_decay, DECAYED, r"the update of parameter first\.weight in step 1"),
        (
            norm_counted_twice,
            {**SGD, "gradient_clipping": 0.1},
            r"the update of parameter first\.weight in step 1",
        ),
        (not_summed_over_ranks, {}, r"the gradient of parameter first\.weight in step 1"),
        (
            one_bucket_is_not_updated,
            {},
            r"the update of parameter (shared|norm)\.(weight|bias) in step 1",
        ),
        (one_element_is_wrong, {}, r"first\.bias in step 1.*1 of its 6 elements are off"),
        (step_counted_twice, {}, r"the update of parameter first\.weight in step 1"),
    ],
)
def test_a_planted_bug_is_found_with_its_parameter(
    plant: Any, keys: dict[str, Any], words: str
) -> None:
    with pytest.raises(RanksFailedError, match=words):
        run_distributed(trained, 2, keys, plant)


def outdated_bias(rank: int) -> Any:
    """What a rank answers with an old bias of its last layer; no gradient tells."""

    @contextmanager
    def plant() -> Iterator[None]:
        right = nn.Linear.forward

        def forward(self: nn.Linear, x: torch.Tensor) -> torch.Tensor:
            answer = right(self, x)
            last = self.out_features == 3 and x.dtype is torch.float32 and self.training
            return answer + 1e-3 if last and id(self) == head else answer

        from drivetrain.job.job import open_jobs

        (job,) = open_jobs()
        head = id(job.engines[0].module.head) if job.rank == rank else 0
        with patch.object(nn.Linear, "forward", forward):
            yield

    return plant


def planted_bias() -> Any:
    return outdated_bias(1)()


def test_an_answer_that_is_wrong_is_found_though_no_gradient_is() -> None:
    words = r"the output 1 of micro-batch 1 of rank 1 in step 1 is off by"
    with pytest.raises(RanksFailedError, match=words):
        run_distributed(trained, 2, SGD, planted_bias)


class Restless(Model):
    """Draws from a generator that nobody sets."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        import random

        return super().forward(x) * (1 + random.random())


def test_a_module_that_is_not_deterministic_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.Model", Restless)
    words = "the module is not deterministic, .* the gradient of parameter first.weight is another"
    with pytest.raises(TrainingError, match=words):
        trained({}, None)


def test_it_says_what_a_constant_factor_looks_like() -> None:
    def doubled() -> Any:
        right = AllReduceBucket.add
        return patch.object(
            AllReduceBucket, "add", lambda self, slot, gradient: right(self, slot, 2 * gradient)
        )

    with pytest.raises(TrainingError, match="it is 2 times the reference"):
        trained({}, doubled)
