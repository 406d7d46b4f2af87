"""A small model with everything that could depend on the layout, and its training."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import drivetrain

SAMPLES, CLASSES, WIDTH = 48, 23, 12
MICRO_BATCH, GLOBAL_BATCH = 2, 24


class Model(nn.Module):
    """Embedding, norm, dropout, a layer that is used twice, and gradients of very unlike sizes."""

    def __init__(self, dropout: float = 0.2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(CLASSES, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.shared = nn.Linear(WIDTH, WIDTH)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(WIDTH, CLASSES)
        self.gain = nn.Parameter(torch.tensor(0.1))

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.embedding(tokens)).mean(1)
        x = self.dropout(torch.tanh(self.shared(x)))
        x = torch.tanh(self.shared(x)) * (self.gain * 10)
        return nn.functional.cross_entropy(self.head(x), targets)


def data() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(CLASSES, (SAMPLES, 5), generator=generator)
    return [(row, row.sum() % CLASSES) for row in tokens]


def make(keys: dict[str, Any], dropout: float = 0.2) -> Any:
    """An engine over the data."""
    torch.manual_seed(3)
    config = {
        "train_batch_size": GLOBAL_BATCH,
        "train_micro_batch_size_per_gpu": MICRO_BATCH,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "weight_decay": 0.1}},
        "gradient_clipping": 0.05,
        "exact": {},
        **keys,
    }
    config = {key: value for key, value in config.items() if value is not None}
    return drivetrain.initialize(model=Model(dropout), training_data=data(), config=config)[0]


def trained(
    keys: dict[str, Any],
    steps: int = 6,
    dropout: float = 0.2,
    load: str | None = None,
    save: str | None = None,
) -> tuple[str, list[torch.Tensor]]:
    """The hash of all states after some steps, and the parameters, whole."""
    engine = make(keys, dropout)
    if load is not None:
        engine.load_checkpoint(load)
    while engine.global_steps < steps:
        engine.train_batch()
    if save is not None:
        engine.save_checkpoint(save)
    from drivetrain_exact import state_hash

    found = state_hash(engine)
    weights = [value.clone() for value in engine.module_state_dict().values()]
    assert all(bool(torch.isfinite(value).all()) for value in weights)
    engine.destroy()
    return found, weights
