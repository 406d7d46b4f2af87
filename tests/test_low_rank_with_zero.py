"""LoRA over packed weights at every stage of ZeRO, against one plain process in float64."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import drivetrain
from drivetrain.errors import ConfigError
from drivetrain.testing import RanksFailedError, run_distributed

sys.path.insert(0, str(Path(__file__).parents[1] / "plugins" / "compression" / "tests"))

from compressed_models import batches, net
from drivetrain_compression import (
    LoRAConfig,
    LoRALinear,
    QuantizationConfig,
    StoredWeight,
    lora_over_quantised,
)
from drivetrain_compression.deepspeed.linear import OptimizedLinear
from drivetrain_compression.stored.formats import Plain

RANKS, STEPS, RATE = 2, 4, 0.05
FORMATS: dict[str, QuantizationConfig | None] = {
    "e4m3": QuantizationConfig(group_size=24),
    "nf4": QuantizationConfig(format="nf4"),
    "int8": QuantizationConfig(format="int8"),
    "fp6": QuantizationConfig(q_bits=6, group_size=64),
    "plain": None,
}
CASES = [
    # format, stage, parts of each base weight, accumulation; pairwise
    ("e4m3", 0, 1, 1),
    ("nf4", 1, 2, 1),
    ("int8", 2, 2, 2),
    ("fp6", 3, 1, 2),
    ("e4m3", 3, 2, 1),
    ("nf4", 2, 1, 1),
    ("int8", 0, 2, 1),
    ("fp6", 1, 1, 1),
    ("plain", 3, 1, 1),
    ("plain", 0, 2, 1),
]
MODULES = ["query", "up", "down"]


def converted(name: str, shards: int) -> Any:
    torch.manual_seed(3)
    model = net(width=32)
    lora = LoRAConfig(lora_r=4, lora_alpha=8.0, base_weight_sharding=shards)
    if FORMATS[name] is None:
        dense_below(model, lora)
    else:
        lora_over_quantised(model, lora, FORMATS[name], modules=MODULES)
    generator = torch.Generator().manual_seed(5)
    for part in model.modules():
        if isinstance(part, LoRALinear):
            for side in (part.lora_weight_1, part.lora_weight_2):
                assert side is not None
                nn.init.normal_(side.weight, std=0.1, generator=generator)
    return model


def dense_below(model: nn.Module, lora: LoRAConfig) -> None:
    """The same with bases that are not quantised."""
    model.requires_grad_(False)
    for path, layer in list(model.named_modules()):
        name = path.rpartition(".")[2]
        if name in MODULES:
            assert isinstance(layer, nn.Linear)
            form = Plain(torch.float64) if lora.base_weight_sharding > 1 else None
            new = LoRALinear(
                layer.weight,
                layer.bias,
                form,
                rank=lora.lora_r,
                alpha=lora.lora_alpha,
                shards=lora.base_weight_sharding,
            )
            setattr(model.get_submodule(path.rpartition(".")[0]), name, new)


def micro_batches(accumulation: int) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
    each = accumulation * RANKS
    flat = batches(STEPS * each)
    return [flat[n * each : (n + 1) * each] for n in range(STEPS)]


def trained(numbers: list[int]) -> list[Any]:
    drivetrain.init_distributed()
    return [one_trained(*CASES[number]) for number in numbers]


def one_trained(name: str, stage: int, shards: int, accumulation: int) -> Any:
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": accumulation,
        "optimizer": {"type": "SGD", "params": {"lr": RATE}},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "activation_checkpointing": {"recompute": "all" if shards > 1 else "none"},
    }
    model = converted(name, shards)
    engine = drivetrain.initialize(model=model, config=config)[0]
    stored = [part for part in model.modules() if isinstance(part, StoredWeight)]
    sizes = [(part.format.bytes(part.shape), part.stored.nbytes) for part in stored]
    trained = {id(p) for group in engine.optimizer.param_groups for p in group["params"]}
    names = {n for n, p in model.named_parameters() if id(p) in trained and p.requires_grad}
    losses = []
    for step in micro_batches(accumulation):
        for tokens, targets in step[engine.job.rank :: RANKS]:
            loss = engine(tokens, targets)
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
    with drivetrain.whole(engine.module):
        state = {n: p.detach().clone() for n, p in model.named_parameters()}
    bases = [part.dequantized() for part in stored]
    engine.destroy()
    return sizes, names, losses, state, bases


class Reference(nn.Module):
    """A linear layer and a low-rank change, of plain operations."""

    def __init__(self, layer: LoRALinear) -> None:
        super().__init__()
        assert layer.lora_weight_1 is not None
        assert layer.lora_weight_2 is not None
        self.base, self.bias = layer.full_weight(), layer.bias
        self.lora_weight_1, self.lora_weight_2 = layer.lora_weight_1, layer.lora_weight_2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = self.lora_weight_1.weight, self.lora_weight_2.weight
        return x @ (self.base + 8 / 4 * b @ a).T + self.bias


def reference(name: str, accumulation: int) -> tuple[list[float], dict[str, torch.Tensor], Any]:
    model = converted(name, 1)
    bases = []
    for path, part in list(model.named_modules()):
        if isinstance(part, LoRALinear):
            bases.append(part.full_weight())
            parent, _, attribute = path.rpartition(".")
            setattr(model.get_submodule(parent), attribute, Reference(part))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)
    losses = []
    for step in micro_batches(accumulation):
        for tokens, targets in step:
            loss = model(tokens, targets)
            (loss / len(step)).backward()
            losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses, dict(model.named_parameters()), bases


@pytest.mark.parametrize("numbers", [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]], ids=["first", "second"])
def test_training_is_that_of_plain_torch(numbers: list[int]) -> None:
    results = run_distributed(trained, RANKS, numbers)
    for at, number in enumerate(numbers):
        name, _, shards, accumulation = CASES[number]
        losses, parameters, bases = reference(name, accumulation)
        for rank, result in enumerate(results):
            sizes, names, own, state, found = result[at]
            assert all(kept == -(-whole // shards) for whole, kept in sizes)
            assert len(sizes) == (0 if name == "plain" and shards == 1 else 6)
            assert names == {n for n in parameters if "lora_weight" in n}
            for step in range(STEPS):
                each = slice(step * accumulation, (step + 1) * accumulation)
                wanted = losses[step * accumulation * RANKS :][rank : accumulation * RANKS : RANKS]
                torch.testing.assert_close(own[each], wanted, rtol=1e-12, atol=0)
            for key, value in parameters.items():
                torch.testing.assert_close(state[key], value.detach(), rtol=1e-10, atol=1e-12)
            assert all(torch.equal(a, b) for a, b in zip(found, bases, strict=bool(found)))


def resumed(folder: str) -> Any:
    """Losses of four steps, once with a new job for the last two."""
    drivetrain.init_distributed()
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": {"type": "SGD", "params": {"lr": RATE, "momentum": 0.9}},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }
    found = []
    for shards, renew in [(1, False), (1, True), (2, True)]:
        losses = []
        engine = drivetrain.initialize(model=converted("nf4", shards), config=config)[0]
        for number, step in enumerate(micro_batches(1)):
            if renew and number == 2:
                engine.save_checkpoint(f"{folder}/{shards}")
                engine.destroy()
                fresh = converted("nf4", shards)
                for part in fresh.modules():
                    if isinstance(part, LoRALinear):
                        nn.init.ones_(part.lora_weight_1.weight)
                engine = drivetrain.initialize(model=fresh, config=config)[0]
                engine.load_checkpoint(f"{folder}/{shards}")
            loss = engine(*step[engine.job.rank])
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        found.append(losses)
        engine.destroy()
    return found


def test_a_job_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    for through, again, divided in run_distributed(resumed, RANKS, str(tmp_path)):
        assert through == again == divided


def plain_and_divided(_: None) -> Any:
    drivetrain.init_distributed()
    torch.manual_seed(torch.distributed.get_rank())  # rank 0's counts
    layer: Any = OptimizedLinear(
        7, 5, lora_config=LoRAConfig(lora_r=2, base_weight_sharding=2), dtype=torch.float64
    )
    torch.manual_seed(0)
    drawn = nn.Linear(7, 5, bias=False, dtype=torch.float64).weight.detach()
    return torch.equal(layer.full_weight(), drawn), layer.weight.stored.nbytes


def test_a_plain_base_is_divided_too() -> None:
    assert run_distributed(plain_and_divided, RANKS, None) == [(True, 7 * 5 * 8 // 2)] * 2


def divided_by_three(_: None) -> None:
    drivetrain.init_distributed()
    OptimizedLinear(8, 8, lora_config=LoRAConfig(base_weight_sharding=3))


def test_other_parts_than_ranks_are_refused() -> None:
    with pytest.raises(RanksFailedError, match="3 parts, but the world has 2 ranks"):
        run_distributed(divided_by_three, RANKS, None)
    with pytest.raises(ConfigError, match="init_distributed"):
        divided_by_three_alone()


def divided_by_three_alone() -> None:
    OptimizedLinear(8, 8, lora_config=LoRAConfig(base_weight_sharding=3))


def served(cases: list[tuple[int, bool]]) -> list[Any]:
    """Logits of a model on the meta device whose weights are packed as they are read."""
    found = []
    for stage, away in cases:
        zero: dict[str, Any] = {"stage": stage, "stage3_param_persistence_threshold": 0}
        if away:
            zero["offload_param"] = {"device": "cpu"}
        config = {
            "train_micro_batch_size_per_gpu": 4,
            "zero_optimization": zero,
            "weight_quantization": {
                "post_init_quant": {"(up|down|query)$": {"num_bits": 4, "group_size": 8}}
            },
        }
        plain = net().float()
        values = {name: value.clone() for name, value in plain.state_dict().items()}
        engine = drivetrain.initialize(model=plain.to("meta"), config=config, weights=values)[0]
        stored = [m for m in engine.module.modules() if isinstance(m, StoredWeight)]
        with torch.no_grad():
            loss = engine.eval()(*batches(1)[0])
        found.append((len(stored), sum(m.stored.nbytes for m in stored), loss.item()))
        engine.destroy()
    return found


def test_packed_weights_serve_where_the_rest_is_partitioned_and_away() -> None:
    plain: Any = net().float()
    for name, parameter in plain.named_parameters():
        if name.endswith(("up.weight", "down.weight", "query.weight")):
            groups = parameter.detach().double().view(-1, 8)
            low = groups.amin(1, keepdim=True)
            step = (groups.amax(1, keepdim=True) - low) / 15
            parameter.data.copy_(
                (torch.round((groups - low) / step) * step + low).view_as(parameter)
            )
    wanted = plain(*batches(1)[0]).item()
    numbers = 2 * (8 * 32 * 2 + 8 * 8)
    for results in run_distributed(served, RANKS, [(0, False), (3, False), (3, True)]):
        for count, kept, loss in results:
            assert (count, kept) == (6, numbers // 2 + numbers // 8 * 8)
            assert loss == pytest.approx(wanted, rel=1e-5)
