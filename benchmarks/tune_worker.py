"""The script that tune_exhaustive.py tunes: a GPT of four blocks, 1.4 million parameters.

Usage: drivetrain run tune_worker.py --config CONFIG.json
"""

from __future__ import annotations

import argparse

import torch

import drivetrain
from drivetrain.testing.models import TinyGPT

WORDS, LENGTH, STEPS = 512, 64, 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = TinyGPT(WORDS, 160, 4, positions=LENGTH)
    engine, *_ = drivetrain.initialize(model=model, config=parser.parse_args().config)
    samples = engine.train_micro_batch_size_per_gpu()
    for _ in range(STEPS * engine.gradient_accumulation_steps()):
        tokens = torch.randint(WORDS, (samples, LENGTH), device=engine.device)
        engine.backward(engine(tokens, tokens))
        engine.step()


if __name__ == "__main__":
    main()
