"""Blocks that the config has recomputed: the run is bit for bit the one without."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from drivetrain_activation_checkpointing import checkpoint
from drivetrain_activation_checkpointing.plugin import ActivationCheckpointing
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

import drivetrain
from drivetrain.engine.engine import Engine
from drivetrain.errors import ConfigError, TrainingError
from drivetrain.testing import PluginConformance
from drivetrain.testing.models import TinyGPT

LAYERS = 4


class TestActivationCheckpointing(PluginConformance):
    plugin = ActivationCheckpointing
    config = {"activation_checkpointing": {"recompute": "all"}}


def model() -> TinyGPT:
    torch.manual_seed(0)
    return TinyGPT(layers=LAYERS, width=16, dropout=0.3)


def make(module: nn.Module, **section: Any) -> Engine:
    engine, *_ = drivetrain.initialize(
        model=module,
        config={
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": 2,
            "gradient_clipping": 0.0,
            "optimizer": {"type": "SGD", "params": {"lr": 0.5}},
            **({"activation_checkpointing": section} if section else {}),
        },
    )
    return engine


def tokens(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    drawn = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(step))
    return drawn[:, :-1], drawn[:, 1:]


def curve(steps: int = 4, **section: Any) -> tuple[list[float], list[torch.Tensor], list[int]]:
    """Losses, weights at the end, and elements saved for backward by each forward."""
    engine = make(model(), **section)
    losses, saved = [], []
    for step in range(2 * steps):
        sizes: dict[int, int] = {}

        def pack(tensor: torch.Tensor, sizes: dict[int, int] = sizes) -> torch.Tensor:
            if not isinstance(tensor, nn.Parameter):
                sizes[id(tensor.untyped_storage()._cdata)] = tensor.untyped_storage().nbytes()
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = engine(*tokens(step))
        saved.append(sum(sizes.values()))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    weights = [p.detach().clone() for p in engine.module.parameters()]
    engine.job.close()
    assert all("forward" not in part.__dict__ for part in engine.module.modules())
    return losses, weights, saved


@pytest.mark.parametrize(
    "section",
    [
        {"recompute": "all"},
        {"recompute": 3},
        {"recompute": "as_needed", "memory_limit": 40_000},
        {
            "recompute": "all",
            "contiguous_memory_optimization": True,
            "number_checkpoints": LAYERS,
            "partition_activations": True,
            "cpu_checkpointing": True,
            "synchronize_checkpoint_boundary": True,
            "profile": True,
        },
    ],
    ids=["all", "every third", "as needed", "side by side"],
)
def test_training_is_bitwise_that_without(section: dict[str, Any]) -> None:
    losses, weights, saved = curve()
    found = curve(**section)
    assert found[0] == losses
    for one, other in zip(found[1], weights, strict=True):
        assert torch.equal(one, other)
    assert found[2][-1] < saved[-1]


def blocks_of(engine: Engine) -> list[Any]:
    return [block.forward for block in engine.module.blocks]


def test_every_nth_block_is_recomputed() -> None:
    engine = make(model(), recompute=3)
    assert [block.recomputes for block in blocks_of(engine)] == [True, False, False, True]
    engine.job.close()


def test_as_needed_keeps_what_fits_after_one_measured_forward() -> None:
    def recomputed(limit: int) -> int:
        engine = make(model(), recompute="as_needed", memory_limit=limit)
        counts = []
        for step in range(3):
            engine.backward(engine(*tokens(step)))
            engine.step()
            counts.append(sum(block.recomputes for block in blocks_of(engine)))
        engine.job.close()
        assert counts[0] == LAYERS  # what is not known yet is not kept
        assert counts[1] == counts[2]
        return counts[2]

    assert recomputed(1) == LAYERS
    assert recomputed(1 << 30) == 0
    assert 0 < recomputed(60_000) < LAYERS


def test_recomputation_has_its_own_time_in_the_report() -> None:
    engine = make(model(), recompute="all", profile=True)
    for step in range(2):
        engine.backward(engine(*tokens(step)))
        engine.step()
    assert engine.last_report is not None
    assert engine.last_report.times["recompute"] > 0
    engine.job.close()


def test_a_copy_of_the_module_computes_with_its_own_weights_and_is_plain() -> None:
    engine = make(model(), recompute="all")
    twin = copy.deepcopy(engine.module)
    stored = io.BytesIO()
    torch.save(engine.module, stored)
    stored.seek(0)
    loaded = torch.load(stored, weights_only=False)
    for other in (twin, loaded):
        with torch.no_grad():
            for p in other.parameters():
                p.zero_()
        other.eval()
        # Of no weights all tokens are as likely.
        assert other(*tokens(0)).item() == pytest.approx(torch.tensor(64.0).log().item())
        assert torch.is_grad_enabled()
        other(*tokens(0)).backward()
        assert all(p.grad is not None for p in other.blocks.parameters())
    assert engine.module.blocks[0].qkv.weight.abs().sum() > 0
    engine.job.close()


def test_a_compiled_block_is_recomputed_by_the_compiler() -> None:
    def trained(compiled: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        module = TinyGPT(layers=2, width=16)
        engine = make(module, recompute="all")
        if compiled:
            engine.compile(backend="aot_eager")
        for step in range(2):
            engine.backward(engine(*tokens(step)))
            engine.step()
        engine.job.close()
        return [p.detach() for p in module.parameters()]

    for one, other in zip(trained(True), trained(False), strict=True):
        torch.testing.assert_close(one, other)


class Cache:
    """Keys and values of earlier tokens, as Transformers has them."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def get_seq_length(self) -> int:
        return len(self.seen)

    def update(self, keys: torch.Tensor) -> torch.Tensor:
        self.seen.append(keys)
        return torch.stack(self.seen).sum(0)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, cache: Cache | None = None) -> torch.Tensor:
        keys = self.linear(x)
        return x + (keys if cache is None else cache.update(keys)).tanh()


class Decoder(nn.Module):
    """Has the switches of Transformers' decoders."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(use_cache=True)
        self.gradient_checkpointing = False
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.wraps = False

    def forward(self, x: torch.Tensor, use_cache: bool | None = None) -> torch.Tensor:
        use_cache = self.config.use_cache if use_cache is None else use_cache
        cache = Cache() if use_cache else None
        for layer in self.layers:
            x = checkpoint(layer, x, cache) if self.wraps else layer(x, cache)
        self.used = cache is not None
        return x.square().mean()


def test_a_decoder_makes_no_cache_where_it_trains() -> None:
    engine = make(Decoder(), recompute="all")
    x = torch.ones(2, 4)
    engine.backward(engine(x))
    assert not engine.module.used
    with torch.no_grad():
        engine(x)
    assert engine.module.used
    assert engine.module.config.use_cache
    with pytest.raises(TrainingError, match=r"layers\.0 gets a cache .* use_cache=False"):
        engine(x, use_cache=True)
    assert engine.module.config.use_cache
    engine.job.close()


class Routed(nn.Module):
    """Leaves what an extra loss is made of elsewhere than in its result."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.router = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = self.router(x)
        self.logits = logits
        return x + self.linear(x).tanh() * logits.softmax(-1)[..., :1]


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(Routed(), Routed())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        loss = self.layers(x).square().mean()
        return loss + sum(layer.logits.logsumexp(-1).square().mean() for layer in self.layers)


def test_what_a_block_leaves_elsewhere_has_its_gradient() -> None:
    def trained(**section: Any) -> list[torch.Tensor]:
        engine = make(Experts(), **section)
        x = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
        for _ in range(4):
            engine.backward(engine(x))
            engine.step()
        engine.job.close()
        return [p.detach() for p in engine.module.parameters()]

    for one, other in zip(trained(recompute="all"), trained(), strict=True):
        assert torch.equal(one, other)


def checkpoints_itself(module: Decoder) -> None:
    module.gradient_checkpointing = True


def wraps_its_layers(module: Decoder) -> None:
    module.wraps = True


def test_two_that_recompute_are_refused() -> None:
    module = Decoder()
    checkpoints_itself(module)
    with pytest.raises(ConfigError, match="recomputes its blocks by itself"):
        make(module, recompute="all")


@pytest.mark.parametrize("switch", [checkpoints_itself, wraps_its_layers])
def test_two_that_recompute_are_refused_when_switched_on_later(
    switch: Callable[[Decoder], None],
) -> None:
    engine = make(Decoder(), recompute="all")
    switch(engine.module)
    with pytest.raises(TrainingError, match="recomputes its blocks by itself"):
        engine.backward(engine(torch.ones(2, 4, requires_grad=True), use_cache=False))
    engine.job.close()


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(ConfigError, match="Linear has no repeated blocks"):
        make(nn.Linear(2, 2), recompute="all")


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"recompute": "as_needed"}, "needs memory_limit"),
        ({"memory_limit": 5}, 'only looked at where recompute is "as_needed"'),
        ({"contiguous_memory_optimization": True}, "needs number_checkpoints"),
        ({"recompute": "some"}, "as_needed"),
        ({"recompute": 0}, "a number above 0"),
    ],
)
def test_broken_sections_are_refused(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(model(), **section)
