"""Scripts with tensor-parallel layers or groups of their own, and adapters beside frozen layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from drivetrain_tensor.analysis import analyse
from drivetrain_tensor.probing import Probe
from drivetrain_tensor.rules import Rules
from tensor_models import build, reference
from test_tensor_training import full, make, train
from torch import nn
from torch.nn import functional as F

import drivetrain
from drivetrain.errors import ConfigError
from drivetrain.testing import run_distributed
from drivetrain.testing.models import TinyGPT

WIDTH, INNER, STEPS, ROWS = 8, 12, 3, 2


# -- layers and groups in Megatron-LM's manner ---------------------------------------------------


class Mpu:
    """Groups of a script: two neighbours share layers, every second one has the same part."""

    def __init__(self) -> None:
        pairs = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])]
        others = [dist.new_group(ranks) for ranks in ([0, 2], [1, 3])]
        rank = dist.get_rank()
        self._tensor, self._data = pairs[rank // 2], others[rank % 2]

    def get_tensor_model_parallel_group(self) -> Any:
        return self._tensor

    def get_tensor_model_parallel_world_size(self) -> int:
        return 2

    def get_tensor_model_parallel_rank(self) -> int:
        return dist.get_rank() % 2

    def get_data_parallel_group(self) -> Any:
        return self._data

    def get_data_parallel_world_size(self) -> int:
        return 2

    def get_data_parallel_rank(self) -> int:
        return dist.get_rank() // 2


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        gradient = gradient.clone()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient, None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Any) -> torch.Tensor:
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return gradient, None


class Whole(nn.Module):
    """A gated MLP with a scale for each hidden feature, whole."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(WIDTH)
        self.gate_up = nn.Linear(WIDTH, 2 * INNER)
        self.scale = nn.Parameter(torch.rand(()) + 0.5)
        self.down = nn.Linear(INNER, WIDTH)

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up(self.norm(x)).chunk(2, -1)
        return F.mse_loss(x + self.down(F.silu(gate) * up * self.scale), target)


class Parted(nn.Module):
    """This rank's part of :class:`Whole`, made by the script."""

    def __init__(self, mpu: Mpu) -> None:
        super().__init__()
        whole, rank = Whole().double(), mpu.get_tensor_model_parallel_rank()
        self.group, self.norm, self.scale = mpu._tensor, whole.norm, whole.scale
        half = slice(rank * INNER // 2, (rank + 1) * INNER // 2)
        for name, whole_tensor in whole.gate_up.named_parameters():
            parts = [part[half] for part in whole_tensor.detach().chunk(2)]
            self._own(f"gate_up_{name}", torch.cat(parts), 0, 2)
        self._own("down_weight", whole.down.weight.detach()[:, half].contiguous(), 1, 1)
        self.down_bias = nn.Parameter(whole.down.bias.detach().clone())
        self.scale.sequence_parallel = True  # ranks have other features, so terms of its gradient

    def _own(self, name: str, value: torch.Tensor, dim: int, stride: int) -> None:
        parameter: Any = nn.Parameter(value.clone())
        parameter.tensor_model_parallel = True
        parameter.partition_dim, parameter.partition_stride = dim, stride
        self.register_parameter(name, parameter)

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        hidden = _Copy.apply(self.norm(x), self.group)
        gate, up = F.linear(hidden, self.gate_up_weight, self.gate_up_bias).chunk(2, -1)
        y = F.linear(F.silu(gate) * up * self.scale, self.down_weight)
        return F.mse_loss(x + _Reduce.apply(y, self.group) + self.down_bias, target)


def batch(step: int, shard: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(10 * step + shard)
    x, y = torch.randn(2, ROWS, WIDTH, generator=generator, dtype=torch.float64)
    return x, y


def in_megatrons_manner() -> tuple[int, list[float], list[float], dict[str, Any]]:
    """Data shard, losses, norms and whole parameters."""
    dist.init_process_group("gloo")
    mpu = Mpu()
    engine, *_ = drivetrain.initialize(
        model=Parted(mpu),
        mpu=mpu,
        config={
            "train_micro_batch_size_per_gpu": ROWS,
            "gradient_clipping": 0.05,
            "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
            "tensor_parallel": {"autotp_size": 2},
        },
    )
    shard, losses, norms = engine.job.mesh.coordinate("dp"), [], []
    assert shard == mpu.get_data_parallel_rank()
    for step in range(STEPS):
        loss = engine(*batch(step, shard))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
        norms.append(float(engine.get_global_grad_norm()))
    found = shard, losses, norms, full(engine)
    engine.destroy()
    return found


def test_a_scripts_own_layers_and_groups_train_as_one_process() -> None:
    model = Whole().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    expected, norms = [], []
    for step in range(STEPS):
        optimizer.zero_grad()
        losses = torch.stack([model(*batch(step, shard)) for shard in range(2)])
        losses.mean().backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 0.05)))
        optimizer.step()
        expected.append(losses.tolist())
    for shard, losses, found, parameters in run_distributed(in_megatrons_manner, 4):
        assert losses == pytest.approx([step[shard] for step in expected], rel=1e-10)
        assert found == pytest.approx(norms, rel=1e-9)
        for path, parameter in model.named_parameters():
            name = path if path in parameters else path.replace(".", "_")
            assert torch.allclose(parameters[name], parameter, rtol=1e-9, atol=1e-12), path


# -- adapters --------------------------------------------------------------------------------------


class Adapted(nn.Module):
    """A frozen layer with a low-rank one beside it (Hu et al. 2021)."""

    def __init__(self, layer: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.a = nn.Linear(layer.in_features, rank, bias=False)
        self.b = nn.Linear(rank, layer.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + 2.0 * self.b(self.a(x))


def adapted() -> nn.Module:
    """A frozen model whose attention has adapters around columns and rows."""
    model: Any = build("llama")
    model.requires_grad_(False)
    torch.manual_seed(1)
    for block in model.model.layers:
        for name in ("q_proj", "v_proj", "o_proj"):
            layer = Adapted(getattr(block.self_attn, name)).double()
            nn.init.normal_(layer.b.weight, std=0.1)
            setattr(block.self_attn, name, layer)
    return model


def with_adapters(section: dict[str, Any]) -> tuple[list[float], dict[str, Any], int]:
    engine = make(adapted(), 2, **section)
    losses = train(engine)
    info = engine.job.parameters.info
    cut = sum(info(p).placement is not None for p in engine.module.parameters())
    found = losses, full(engine), cut
    engine.destroy()
    return found


@pytest.mark.parametrize("section", [{}, {"sequence_parallel": True}])
def test_adapters_train_beside_frozen_layers_that_are_cut(section: dict[str, Any]) -> None:
    model = adapted()
    expected = reference(model, STEPS)
    for losses, parameters, cut in run_distributed(with_adapters, 2, section):
        assert losses == pytest.approx(expected, rel=1e-9)
        assert cut >= 2 * 7
        for path, parameter in model.named_parameters():
            assert torch.allclose(parameters[path], parameter, rtol=1e-8, atol=1e-10), path


# -- what cannot be cut ----------------------------------------------------------------------------


def test_more_ranks_than_heads_are_refused_with_the_number() -> None:
    model = build("llama")
    with pytest.raises(ConfigError, match=r"self_attn.o_proj reads 4 independent groups") as error:
        analyse(model, 5, Rules(None, model))
    assert "use at most 4 ranks" in str(error.value)


@pytest.mark.parametrize("heads", [1, 2, 3])
def test_key_value_heads_need_not_be_as_many_as_ranks(heads: int) -> None:
    """Six query heads over four ranks, which have two, two, one and one of them."""
    model = build("llama", num_attention_heads=6, num_key_value_heads=heads, hidden_size=24)
    found = analyse(model, 4, Rules(None, model))
    attention = next(d for d in found.decisions if len(d.region.sources) == 3)
    assert not attention.cut.whole
    assert [stop - start for start, stop in attention.cut.groups] == [2, 2, 1, 1]


def runs_of_the_model(layers: int, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """How often the model is run to find out what to cut, and how many regions are."""
    runs, run = [], Probe.run

    def counted(self: Probe, *args: Any, **kwargs: Any) -> Any:
        runs.append(1)
        return run(self, *args, **kwargs)

    with torch.device("meta"):
        model = TinyGPT(vocabulary=64, width=96, layers=layers, heads=4, positions=16)
    with monkeypatch.context() as patch:
        patch.setattr(Probe, "run", counted)
        found = analyse(model, 2, Rules(None, model))
    return len(runs), len(found.decisions)


def test_more_blocks_take_no_more_runs_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    few, cut = runs_of_the_model(2, monkeypatch)
    assert cut == 2 * 2
    assert runs_of_the_model(10, monkeypatch) == (few, 10 * 2)
