"""A network that learns digits in few bits, beside one whose weights are rounded afterwards.

    pip install drivetrain-compression scikit-learn
    python examples/compress/train_quantised.py --bits 1 --epochs 10

Both have the same beginning and data. One trains with exact weights, and is rounded to the same
bits when it is done; of the other, ``compression_training`` rounds the weights in every forward, at
first to 8 bits, and gradients pass straight through. The head stays exact in both.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
import torch.nn.functional as F
from drivetrain_compression import init_compression, redundancy_clean
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

import drivetrain

CONFIG: dict[str, Any] = {
    "train_batch_size": 60,
    "optimizer": {"type": "AdamW", "params": {"lr": 3e-3, "weight_decay": 0.01}},
    "gradient_clipping": 1.0,
}
HIDDEN = ["^0$", "^2$"]
"""Layers in few bits: all but the head."""

TEST = 297
"""Images kept for the test, the last of 1,797."""


def network() -> nn.Sequential:
    """[batch, 64] pixels to [batch, 10] scores."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)
    )


def in_bits(bits: int, start: int, offset: int, period: int) -> dict[str, Any]:
    """The section that rounds hidden layers' weights: one scale for each of 64 rows."""
    shared = {"enabled": True, "schedule_offset": offset, "quantize_groups": 64}
    schedule = {"start_bits": start, "target_bits": bits, "quantization_period": period}
    group = {"params": schedule, "modules": HIDDEN}
    return {
        "weight_quantization": {"shared_parameters": shared, "different_groups": {"all": group}}
    }


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Images [1797, 64] from 0 to 1, and labels."""
    found = load_digits()
    return torch.tensor(found.data, dtype=torch.float32) / 16, torch.tensor(found.target)


def trained(config: dict[str, Any], epochs: int) -> nn.Module:
    """The network after training; with the section, its layers compute with few bits."""
    images, labels = digits()
    engine, _, loader, _ = drivetrain.initialize(
        model=network(),
        training_data=TensorDataset(images[:-TEST], labels[:-TEST]),
        config=config,
    )
    assert loader is not None
    for _ in range(epochs):
        for inputs, targets in loader:
            engine.backward(F.cross_entropy(engine(inputs), targets))
            engine.step()
    model: nn.Module = engine.module
    engine.destroy()
    return model


def right(model: nn.Module) -> float:
    """Share of the test's images that are told."""
    images, labels = digits()
    with torch.no_grad():
        found = model.eval()(images[-TEST:]).argmax(1)
    return float((found == labels[-TEST:]).float().mean())


def main() -> None:
    """Train both, and compare them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bits", type=int, default=1, help="2 is ternary, 1 is binary.")
    parser.add_argument("--epochs", type=int, default=10)
    options = parser.parse_args()
    exact = trained(CONFIG, options.epochs)
    print(f"exact weights: {right(exact):.1%} of the test images right")
    at_once = {**CONFIG, "compression_training": in_bits(options.bits, options.bits, 0, 1)}
    rounded = redundancy_clean(init_compression(exact, at_once), at_once)
    print(f"rounded to {options.bits} bits afterwards: {right(rounded):.1%}")
    falling = in_bits(options.bits, 8, 25, 2)
    aware = trained({**CONFIG, "compression_training": falling}, options.epochs)
    small = redundancy_clean(aware, {**CONFIG, "compression_training": falling})
    print(f"trained in {options.bits} bits: {right(small):.1%}")


if __name__ == "__main__":
    main()
