"""Which experts of a model are computed as ordinary gated ones on a host."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import drivetrain

transformers = pytest.importorskip("transformers")


class Layer(nn.Module):
    """Experts of Mixtral with some activation, each of which gets a token."""

    def __init__(self, activation: str) -> None:
        super().__init__()
        config = transformers.MixtralConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            vocab_size=8,
            num_local_experts=4,
            hidden_act=activation,
        )
        config._experts_implementation = "eager"
        self.experts = transformers.MixtralForCausalLM(config).model.layers[0].mlp.experts
        generator = torch.Generator().manual_seed(1)
        for weight in self.experts.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.data = noise / weight.shape[-1] ** 0.5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        index = torch.arange(len(x)).remainder(4).unsqueeze(1)
        out: torch.Tensor = self.experts(x, index, torch.ones_like(index, dtype=x.dtype))
        return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_an_activation_that_is_near_another_is_not_taken_for_it(dtype: torch.dtype) -> None:
    sections = {"expert_parallel": {"enabled": True}, "moe": {"cached_experts": 3}}
    plan = drivetrain.Plan.build({"train_batch_size": 2, **sections})
    for activation, known in (("quick_gelu", None), ("gelu", "gelu"), ("silu", "silu")):
        layer = Layer(activation).to(dtype)
        experts = layer.experts
        with drivetrain.Job.open(plan) as job, torch.no_grad():
            engine = job.engine(layer, parameters=())
            engine(torch.ones(5, 16, dtype=dtype))
            (found,) = experts.forward._ordinary.values()
            assert (found and found[0].activation) == known
        assert experts.gate_up_proj.dtype == dtype
        assert (experts.num_experts, len(experts.gate_up_proj)) == (4, 4)
