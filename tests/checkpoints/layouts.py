"""A small model trained in any layout, with all that a resume has to bring back."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from drivetrain_checkpoint_tools import inspect
from torch import nn

import drivetrain
from drivetrain.checkpoint.opening import opened
from drivetrain.engine.engine import Engine


@dataclass(frozen=True)
class Layout:
    """How a job is laid out.

    Args:
        stage: of ZeRO.
        world: number of ranks.
        dtype: of the parameters; masters and optimizer states are fp32 in all of them.
        offload: ``"host"`` for optimizer states in host memory, ``"files"`` for states in files,
            ``"all-files"`` for parameters as well.
        in_forward: parameters are gathered in forward, at stages 1 and 2.
        folder: for those files.
    """

    stage: int
    world: int
    dtype: str = "fp32"
    offload: str = ""
    in_forward: bool = False
    folder: str = field(default="", compare=False)

    def __str__(self) -> str:
        offload = f"-{self.offload}" if self.offload else ""
        gathered = "-in-forward" if self.in_forward else ""
        return f"zero{self.stage}-{self.world}ranks-{self.dtype}{offload}{gathered}"

    def below(self, folder: Path) -> Layout:
        """The same layout, with its files somewhere in ``folder``."""
        return replace(self, folder=str(folder / "swap"))

    def config(self) -> dict[str, Any]:
        """The job's config."""
        config: dict[str, Any] = {
            "train_batch_size": 12,
            "gradient_clipping": 0.5,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.1}},
            "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 30}},
            "data_parallel": {"bucket_bytes": 256, "first_bucket_bytes": 128},
            "zero_optimization": {"stage": self.stage, "stage3_param_persistence_threshold": 0},
        }
        if self.in_forward:
            config["zero_optimization"] |= {"overlap_param_gather": True, "overlap_comm": True}
        if self.dtype != "fp32":
            config[self.dtype] = {"enabled": True}
        if self.offload:
            device = "cpu" if self.offload == "host" else "nvme"
            states = {"device": device, "nvme_path": self.folder, "buffer_size": 16}
            config["zero_optimization"]["offload_optimizer"] = states
        if self.offload == "all-files":
            parameters = {"device": "nvme", "nvme_path": self.folder, "max_in_cpu": 0}
            config["zero_optimization"]["offload_param"] = parameters
        return config


class Model(nn.Module):
    """Blocks with dropout, sizes that no number of ranks divides, a tied and a frozen weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(4, 7)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(7), nn.Linear(7, 7), nn.Dropout(0.2)) for _ in range(2)
        )
        self.again = nn.Linear(7, 7, bias=False)
        self.again.weight = self.blocks[0][1].weight
        self.frozen = nn.Linear(7, 3)
        self.frozen.requires_grad_(False)
        with torch.no_grad():  # it has no master, so only such values survive in bf16
            for parameter in self.frozen.parameters():
                parameter.copy_(parameter.bfloat16())
        self.outer = nn.Linear(3, 1)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Samples [batch, 4], targets [batch, 1] -> scalar."""
        x = self.inner(x.to(self.inner.weight.dtype))
        for block in self.blocks:
            x = x + block(x)
        return (self.outer(self.frozen(self.again(x))).float() - y).square().mean()


def make(layout: Layout) -> Engine:
    """An engine with its own data."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(60, 4, generator=generator)
    module = Model()
    engine, *_ = drivetrain.initialize(
        model=module,
        model_parameters=[p for p in module.parameters() if p.requires_grad],
        training_data=torch.utils.data.TensorDataset(x, x.sum(1, keepdim=True)),
        config=layout.config(),
    )
    return engine


def train(engine: Engine, steps: int) -> list[float]:
    """Losses of so many steps."""
    return [engine.train_batch().item() for _ in range(steps)]


def hashes(folder: Path, tag: str) -> dict[str, str]:
    """SHA-256 of every stored tensor, by kind and name."""
    with opened(str(folder), tag) as stored:
        return {f"{t.kind} {t.name}": t.values["sha256"] for t in inspect(stored, hashes=True)}
