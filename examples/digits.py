"""A convolutional network learns scikit-learn's handwritten digits.

drivetrain run --nproc 2 examples/digits.py
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

import drivetrain

CONFIG = {
    "train_batch_size": 60,
    "optimizer": {"type": "AdamW", "params": {"lr": 3e-3, "weight_decay": 0.01}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 25}},
    "gradient_clipping": 1.0,
}

TEST = 297
"""Images kept for the test, the last of 1,797."""


def network() -> nn.Sequential:
    """[batch, 1, 8, 8] images to [batch, 10] scores."""
    return nn.Sequential(
        nn.Conv2d(1, 32, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 2 * 2, 10),
    )


def main() -> None:
    """Train for some epochs, testing after each."""
    parser = argparse.ArgumentParser(description="Train a small network on digits.")
    parser.add_argument("--epochs", type=int, default=10)
    epochs = parser.parse_args().epochs

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    torch.manual_seed(0)
    engine, _, loader, _ = drivetrain.initialize(
        model=network(),
        training_data=TensorDataset(images[:-TEST], labels[:-TEST]),
        config=CONFIG,
    )
    assert loader is not None
    test_images, test_labels = images[-TEST:].to(engine.device), labels[-TEST:].to(engine.device)
    for epoch in range(epochs):
        engine.train()
        for inputs, targets in loader:
            scores = engine(inputs.to(engine.device))
            loss = F.cross_entropy(scores, targets.to(engine.device))
            engine.backward(loss)
            engine.step()
        engine.eval()
        with torch.no_grad():
            right = (engine(test_images).argmax(1) == test_labels).float().mean().item()
        if engine.job.rank == 0:
            print(
                f"epoch {epoch + 1}: loss {loss.item():.4f}, {right:.1%} of the test images right"
            )
    engine.destroy()


if __name__ == "__main__":
    main()
