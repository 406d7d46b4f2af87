"""Bits fall more slowly where the loss is curved."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compressed_models import batches, group, method, net, quantised
from drivetrain_compression.training.session import session_of
from test_smaller_in_training import BASE, engine_of
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from drivetrain.errors import ConfigError

BITS = {"start_bits": 8, "target_bits": 3, "quantization_period": 2}
SECTION = {"weight_quantization": method({}, {"g": group(["up"], **BITS)})}


def model_of() -> Any:
    model = net(layers=3, width=4)
    with torch.no_grad():
        model.layers[2].down.weight.mul_(6)
        model.layers[0].down.weight.mul_(0.1)
    return model


def whole_hessians(model: Any, shown: dict[str, torch.Tensor], batch: Any) -> list[float]:
    with sdpa_kernel(SDPBackend.MATH):
        loss = functional_call(model, shown, batch)
    found = []
    for layer in model.layers:
        parameters = list(layer.parameters())
        first = torch.autograd.grad(loss, parameters, create_graph=True)
        flat = torch.cat([g.reshape(-1) for g in first])
        rows = [
            torch.cat(
                [
                    p.reshape(-1)
                    for p in torch.autograd.grad(
                        f, parameters, retain_graph=True, materialize_grads=True
                    )
                ]
            )
            for f in flat
        ]
        values = torch.linalg.eigvalsh(torch.stack(rows))
        found.append(float(values.abs().max()))
    return found


def test_periods_grow_by_the_eigenvalues_of_whole_hessians() -> None:
    eigen = {"enabled": True, "max_iter": 400, "tol": 1e-6}
    engine, reference = engine_of(SECTION, model_of(), eigenvalue=eigen), model_of()
    bits, periods = [8] * 3, [2] * 3
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.3)
    factors: list[int] = []
    for step, batch in enumerate(batches(5)):
        calls = step + 1
        for n in range(3):
            if bits[n] > 3 and calls >= periods[n]:
                bits[n] -= 1
                periods[n] = 2 * periods[n] * factors[n]
        shown = {
            n: quantised(p, bits[int(n.split(".")[1])]) if "up.weight" in n else p
            for n, p in reference.named_parameters()
        }
        due = any(b > 3 and calls + 1 >= p for b, p in zip(bits, periods, strict=True))
        if due:
            values = whole_hessians(reference, shown, batch)
            factors = [1 + int(4 * value / max(values)) for value in values]
        with sdpa_kernel(SDPBackend.MATH):
            loss = functional_call(reference, shown, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found = engine(*batch)
        session: Any = session_of(engine.module)
        schedules = [s.schedule for _, s in session.modifiers[0].steps()]
        assert [s.bits for s in schedules] == bits, step
        assert [s.period for s in schedules] == periods, step
        engine.backward(found)
        engine.step()
        assert found.item() == pytest.approx(loss.item(), rel=1e-11), step
    assert len(set(periods)) > 1
    assert max(factors) == 5


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"layer_name": "bert"}, "Net has no module 'bert'"),
        ({"layer_num": 5}, "layer_num is 5, but there are 3 blocks"),
    ],
)
def test_blocks_that_are_not_there_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        engine_of(SECTION, model_of(), eigenvalue={"enabled": True, **keys})


def test_eigenvalues_without_falling_bits_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"eigenvalue: it lets bits .* which is off"):
        engine_of({}, net(), eigenvalue={"enabled": True})
    assert BASE
