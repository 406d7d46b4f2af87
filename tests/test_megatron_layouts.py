"""What was cut in Megatron's manner goes on at any layout of ours, through the usual load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from drivetrain_checkpoint_tools import import_deepspeed
from torch import nn
from torch.nn import functional as F

import drivetrain
from drivetrain.testing import run_distributed

WIDTH, INNER, HEADS, VOCABULARY, TOKENS, RATE = 16, 24, 4, 32, 6, 0.1


class Attention(nn.Module):
    """Queries, keys and values are one matrix, head by head."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = HEADS
        self.query_key_value = nn.Linear(WIDTH, 3 * WIDTH)
        self.dense = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, _ = x.shape
        every = self.query_key_value(x).view(batch, tokens, self.heads, -1).transpose(1, 2)
        y = F.scaled_dot_product_attention(*every.chunk(3, -1), is_causal=True)
        return self.dense(y.transpose(1, 2).reshape(batch, tokens, -1))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(WIDTH, 2 * INNER, bias=False)
        self.dense_4h_to_h = nn.Linear(INNER, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.dense_h_to_4h(x).chunk(2, -1)
        return self.dense_4h_to_h(F.silu(gate) * up)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = (
            nn.LayerNorm(WIDTH),
            nn.LayerNorm(WIDTH),
        )
        self.self_attention, self.mlp = Attention(), Mlp()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.self_attention(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class Model(nn.Module):
    """A decoder with Megatron's names."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.language_model = nn.ModuleDict(
            {
                "embedding": nn.ModuleDict({"word_embeddings": nn.Embedding(VOCABULARY, WIDTH)}),
                "encoder": nn.ModuleDict(
                    {
                        "layers": nn.ModuleList([Layer(), Layer()]),
                        "final_layernorm": nn.LayerNorm(WIDTH),
                    }
                ),
                "output_layer": nn.Linear(WIDTH, VOCABULARY, bias=False),
            }
        )

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        parts: Any = self.language_model
        x = parts["embedding"]["word_embeddings"](tokens)
        for layer in parts["encoder"]["layers"]:
            x = layer(x)
        logits = parts["output_layer"](parts["encoder"]["final_layernorm"](x))
        return F.cross_entropy(logits.flatten(0, 1), tokens.roll(-1, 1).flatten())


def tokens(step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randint(VOCABULARY, (2, TOKENS), generator=generator)


def cut(name: str, x: torch.Tensor, rank: int) -> torch.Tensor:
    """What rank 0 or 1 of two has."""
    if "layernorm" in name or name.endswith("dense.bias"):
        return x
    if "dense_h_to_4h" in name:
        gate, up = x.chunk(2)
        return torch.cat([gate.chunk(2)[rank], up.chunk(2)[rank]])
    rows = name.endswith(("dense.weight", "4h_to_h.weight"))
    return x.chunk(2, 1 if rows else 0)[rank].clone()


def write(folder: Path) -> None:
    """The files of two tensor-parallel ranks."""
    module = {name: p.detach() for name, p in Model().named_parameters()}
    for rank in range(2):
        own = {name: cut(name, x, rank) for name, x in module.items()}
        content = {
            "module": own,
            "buffer_names": [],
            "param_shapes": [{name: x.shape for name, x in own.items()}],
            "shared_params": {},
            "optimizer": None,
            "global_steps": 5,
            "dp_world_size": 1,
        }
        torch.save(content, folder / f"mp_rank_{rank:02d}_model_states.pt")


def losses(folder: str, tp: int, stage: int) -> list[float]:
    engine, *_ = drivetrain.initialize(
        model=Model(seed=1),
        config={
            "train_micro_batch_size_per_gpu": 2,
            "gradient_clipping": 0,
            "optimizer": {"type": "SGD", "params": {"lr": RATE}},
            "zero_optimization": {"stage": stage},
            "tensor_parallel": {"autotp_size": tp},
        },
    )
    engine.load_checkpoint(folder, load_module_only=True)
    found = []
    for step in range(3):
        loss = engine(tokens(step))
        engine.backward(loss)
        engine.step()
        found.append(loss.item())
    engine.destroy()
    return found


@pytest.mark.parametrize(("world", "tp", "stage"), [(1, 1, 0), (2, 2, 1), (4, 4, 0), (4, 2, 3)])
def test_it_trains_on_at_another_layout(world: int, tp: int, stage: int, tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    write(tmp_path / "theirs")
    import_deepspeed(str(tmp_path / "theirs"), str(tmp_path / "ours"))
    model, expected = Model(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for step in range(3):
        optimizer.zero_grad()
        loss = model(tokens(step))
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    for found in run_distributed(losses, world, str(tmp_path / "ours"), tp, stage):
        assert found == pytest.approx(expected, rel=1e-5)
