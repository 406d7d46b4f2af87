"""What tests of several optimizers share: known gradients, and compression of all ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from drivetrain_onebit.compression import chunk_size
from torch import nn

import drivetrain
from drivetrain.communication.process_group import Ranks
from drivetrain.engine.engine import Engine

SHAPES = {"last": (5,), "first": (6, 4)}
"""In the order of a bucket, which is the reverse of the module's."""

NUMEL = sum(int(np.prod(shape)) for shape in SHAPES.values())


def cuts(flat: np.ndarray) -> dict[str, np.ndarray]:
    """Views of the tensors in a flat bucket [..., NUMEL]."""
    found, at = {}, 0
    for name, shape in SHAPES.items():
        numel = int(np.prod(shape))
        found[name] = flat[..., at : at + numel]
        at += numel
    return found


def gradient(step: int, rank: int, quiet: int = 0) -> np.ndarray:
    """[NUMEL]; the tensor "last" has a tenth of the other's, and nothing in its first elements.

    Args:
        step: of training, from 0.
        rank: whose.
        quiet: during so many steps the first element of "last" has none.
    """
    values = np.random.default_rng(1000 * step + rank).standard_normal(NUMEL)
    cuts(values)["last"][:] *= 0.1
    if step < quiet:
        values[0] = 0.0
    return values


def initial() -> np.ndarray:
    return np.linspace(-1, 1, NUMEL).astype(np.float32).astype(np.float64)


class Given(nn.Module):
    """A loss whose gradient is its input."""

    def __init__(self) -> None:
        super().__init__()
        values = cuts(initial())
        for name in reversed(SHAPES):
            value = torch.tensor(values[name], dtype=torch.float32).view(SHAPES[name])
            setattr(self, name, nn.Parameter(value))

    def forward(self, gradient: torch.Tensor) -> torch.Tensor:
        parts = cuts(gradient.numpy())
        terms = [
            (getattr(self, name) * torch.from_numpy(part).view(SHAPES[name])).sum()
            for name, part in parts.items()
        ]
        return terms[0] + terms[1]

    def flat(self) -> np.ndarray:
        parts = [getattr(self, name).detach().double().reshape(-1) for name in SHAPES]
        return torch.cat(parts).numpy().copy()


def make(kind: str, params: Mapping[str, Any], **config: Any) -> Engine:
    given = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "optimizer": {"type": kind, "params": dict(params)},
        **config,
    }
    engine, *_ = drivetrain.initialize(model=Given(), config=given)
    return engine


def train(engine: Engine, steps: range, quiet: int = 0) -> list[np.ndarray]:
    """The weights after each step."""
    seen = []
    for step in steps:
        values = gradient(step, Ranks.current().rank, quiet)
        engine.backward(engine(torch.tensor(values, dtype=torch.float32)))
        engine.step()
        seen.append(engine.module.flat())
    return seen


def signs_of(values: np.ndarray) -> np.ndarray:
    scale = np.linalg.norm(values) / np.sqrt(len(values))
    return np.where(values >= 0, scale, -scale)


class OnePerRank:
    """Compression with error feedback, of all ranks at once, in float64."""

    def __init__(self, world: int, numel: int = NUMEL) -> None:
        self.world, self.chunk = world, chunk_size(numel, world)
        self.worker_errors = np.zeros((world, numel))
        self.server_errors = np.zeros((world, self.chunk))

    def mean(self, vectors: np.ndarray) -> np.ndarray:
        values = vectors + self.worker_errors
        sent = np.stack([signs_of(value) for value in values])
        self.worker_errors = values - sent
        mean = sent.mean(axis=0)
        for rank in range(self.world):
            part = mean[rank * self.chunk : (rank + 1) * self.chunk]
            if len(part):
                value = part + self.server_errors[rank, : len(part)]
                part[:] = signs_of(value)
                self.server_errors[rank, : len(part)] = value - part
        return mean
