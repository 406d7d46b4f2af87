"""A mixture of experts with fewer layers learns from its teacher, experts on two ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from drivetrain_compression import init_compression
from torch import nn

import drivetrain
from drivetrain.testing import run_distributed

moe = pytest.importorskip("drivetrain_moe")

WIDTH, EXPERTS, CLASSES, STEPS, RATE, BALANCE = 6, 4, 5, 4, 0.3, 0.01

CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_clipping": 0.0,
    "optimizer": {"type": "SGD", "params": {"lr": RATE}},
    "compression_training": {
        "layer_reduction": {
            "enabled": True,
            "module_name_prefix": "layers",
            "teacher_layer": [0, 2],
            "other_module_name": ["stem", "head"],
        },
        "distillation": {
            "enabled": True,
            "terms": [{"student": "head", "loss": "kl", "weight": 0.7, "until_step": 2}],
        },
    },
}


class Model(nn.Module):
    def __init__(self, layers: int, ep: int, seed: int) -> None:
        super().__init__()
        self.stem = nn.Linear(3, WIDTH)
        options: dict[str, Any] = {"k": 2, "drop_tokens": False, "top2_2nd_expert_sampling": False}
        self.layers = nn.ModuleList(
            moe.MoE(WIDTH, nn.Linear(WIDTH, WIDTH), EXPERTS, ep, **options) for _ in range(layers)
        )
        self.head = nn.Linear(WIDTH, CLASSES)
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) / 2
        self.double()

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        hidden, balance = self.stem(x), x.new_zeros(())
        for layer in self.layers:
            out, more, _ = layer(hidden)
            hidden, balance = hidden + torch.tanh(out), balance + more
        return F.cross_entropy(self.head(hidden), y) + BALANCE * balance


def batch(step: int, shard: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(10 * step + shard)
    x = torch.randn(9, 3, generator=generator, dtype=torch.float64)
    return x, torch.randint(CLASSES, (9,), generator=generator)


def student() -> tuple[Model, Model]:
    """The student, begun with layers of its teacher, and the teacher."""
    teacher, own = Model(3, 1, seed=1), Model(2, 2, seed=2)
    return init_compression(own, CONFIG, teacher_model=teacher), teacher  # type: ignore[return-value]


def train() -> dict[str, torch.Tensor]:
    model, _ = student()
    engine = drivetrain.initialize(model=model, config=CONFIG)[0]
    assert sorted(engine.module.layers[0].experts) == [
        str(2 * engine.job.rank + own) for own in range(2)
    ]
    for step in range(STEPS):
        engine.backward(engine(*batch(step, engine.job.rank)))
        engine.step()
    with drivetrain.whole(engine.module):
        found = {n: p.detach().clone() for n, p in engine.module.named_parameters()}
    engine.destroy()
    return found


def logits_of(model: Model, inputs: tuple[torch.Tensor, torch.Tensor]) -> Any:
    """Logits and loss."""
    seen: list[torch.Tensor] = []
    hook = model.head.register_forward_hook(lambda _module, _inputs, out: seen.append(out))
    loss = model(*inputs)
    hook.remove()
    return seen[0], loss


def test_a_student_of_experts_learns_as_in_one_process_with_plain_torch() -> None:
    teacher, reference = Model(3, 1, seed=1), Model(2, 1, seed=2)
    names = {"layers.0": "layers.0", "layers.1": "layers.2", "stem": "stem", "head": "head"}
    for own, given in names.items():
        state = teacher.get_submodule(given).state_dict()
        reference.get_submodule(own).load_state_dict(state)
    optimizer = torch.optim.SGD(reference.parameters(), lr=RATE)
    for step in range(STEPS):
        losses = []
        for shard in range(2):
            logits, loss = logits_of(reference, batch(step, shard))
            with torch.no_grad():
                wanted, _ = logits_of(teacher, batch(step, shard))
            kl = F.kl_div(logits.log_softmax(-1), wanted.softmax(-1), reduction="batchmean")
            losses.append(loss + (0.7 * kl if step < 2 else 0))
        optimizer.zero_grad()
        torch.stack(losses).mean().backward()
        optimizer.step()
    seen: set[str] = set()
    for found in run_distributed(train, 2):
        seen |= set(found)
        for name, value in found.items():
            torch.testing.assert_close(
                value, reference.get_parameter(name).detach(), rtol=1e-9, atol=1e-11, msg=name
            )
    assert seen == set(reference.state_dict())
