"""Gradient norms and clipping as plain torch has them in float64, however large gradients are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import drivetrain
from drivetrain.errors import TrainingError
from drivetrain.testing import run_distributed

PLACES: dict[str, dict[str, Any]] = {
    "0": {"stage": 0},
    "1": {"stage": 1},
    "2": {"stage": 2},
    "3": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "0 offloaded": {"stage": 0, "offload_optimizer": {"device": "cpu"}},
    "3 offloaded": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "offload_optimizer": {"device": "cpu"},
    },
}
CASES = [
    # dtype, size of gradients, clipping, optimizer
    (torch.float32, 1e20, 0.5, "SGD"),
    (torch.float32, 1e36, 0.5, "AdamW"),
    (torch.float32, 1e-28, 0.5, "SGD"),
    (torch.float64, 1.0, 0.5, "SGD"),
    (torch.float64, 1.0, 0.0, "AdamW"),
    (torch.float64, 1e100, 0.5, "SGD"),
    (torch.complex64, 1e20, 0.5, "SGD"),
]
BIG = 5000  # more than one row of squares, and a rest
SETTINGS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.1},
    "AdamW": {"lr": 0.1, "weight_decay": 0.0},
}


class Net(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Parameter(torch.randn(3, 7, dtype=dtype))
        self.b = nn.Parameter(torch.randn(BIG, dtype=dtype))

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        total = (self.a * a).sum() + (self.b * b).sum()
        return total.real if total.is_complex() else total


def gradients(dtype: torch.dtype, size: float, rank: int) -> list[torch.Tensor]:
    torch.manual_seed(1 + rank)
    return [torch.randn(shape, dtype=dtype) * size for shape in ((3, 7), (BIG,))]


def trained(dtype: torch.dtype, size: float, clipping: float, name: str, place: str) -> Any:
    """Weights and norm after two steps on this rank."""
    engine, *_ = drivetrain.initialize(
        model=Net(dtype),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "gradient_clipping": clipping,
            "optimizer": {"type": name, "params": SETTINGS[name]},
            "zero_optimization": PLACES[place],
        },
    )
    engine.get_global_grad_norm()
    for _ in range(2):
        engine.backward(engine(*gradients(dtype, size, engine.job.rank)))
        engine.step()
    found = engine.module_state_dict(), engine.get_global_grad_norm()
    engine.destroy()
    return found


def plain(dtype: torch.dtype, size: float, clipping: float, name: str) -> Any:
    model = Net(dtype).to(torch.complex128 if dtype.is_complex else torch.float64)
    optimizer = getattr(torch.optim, name)(model.parameters(), **SETTINGS[name])
    for _ in range(2):
        for parts, parameter in zip(
            zip(*(gradients(dtype, size, rank) for rank in (0, 1)), strict=True),
            model.parameters(),
            strict=True,
        ):
            mean = sum(part.to(parameter.dtype) for part in parts) / 2
            parameter.grad = mean.conj().resolve_conj()
        limit = clipping or float("inf")
        norm = nn.utils.clip_grad_norm_(model.parameters(), limit)
        optimizer.step()
    return model.state_dict(), float(norm)


def applies(case: tuple[Any, ...], place: str) -> bool:
    return not case[0].is_complex or place == "0"  # others refuse complex parameters


def all_trained() -> dict[Any, Any]:
    return {
        (case, place): trained(*case, place)
        for case in CASES
        for place in PLACES
        if applies(case, place)
    }


def test_norm_and_clipping_are_those_of_float64() -> None:
    ranks = run_distributed(all_trained, 2)
    for (case, place), (weights, norm) in ranks[0].items():
        expected, expected_norm = plain(*case)
        exact = case[0] == torch.float64
        what = f"{case} at stage {place}"
        assert norm == pytest.approx(expected_norm, rel=1e-12 if exact else 1e-6), what
        for key, value in expected.items():
            close = torch.allclose(
                weights[key].to(value.dtype), value, rtol=0, atol=1e-12 if exact else 1e-6
            )
            assert close, f"{key} of {what}"


def refusals(wrong: float) -> list[str]:
    found = []
    for place in PLACES:
        engine, *_ = drivetrain.initialize(
            model=Net(torch.float32),
            config={
                "train_micro_batch_size_per_gpu": 1,
                "gradient_clipping": 1.0,
                "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
                "zero_optimization": PLACES[place],
            },
        )
        inputs = gradients(torch.float32, 1e20, engine.job.rank)
        # not the loss: what is infinite in backward only
        loss = engine(*inputs)
        state = next(p for n, p in engine.module.named_parameters() if n == "b")
        hook = state.register_hook(lambda g: g.index_fill(0, torch.tensor([BIG - 1]), wrong))
        before = {k: v.clone() for k, v in engine.module_state_dict().items()}
        try:
            engine.backward(loss)
            engine.step()
        except TrainingError as error:
            after = engine.module_state_dict()
            same = all(torch.equal(before[key], after[key]) for key in before)
            found.append(f"{same} {error}")
        hook.remove()
        engine.destroy()
    return found


@pytest.mark.parametrize("wrong", [float("inf"), float("nan")])
def test_one_infinite_element_among_large_ones_is_found(wrong: float) -> None:
    for rank in run_distributed(refusals, 2, wrong):
        assert len(rank) == len(PLACES)
        assert all("norm of step 1 is not finite" in text for text in rank)
        assert all(text.startswith("True") for text in rank)
