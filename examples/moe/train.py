"""Train the quickstart's GPT and the same with 8 experts a layer, at equal compute a token.

    drivetrain run --nproc 2 examples/moe/train.py
    drivetrain moe load runs/moe/load.jsonl

Each token is computed by one expert of the size of the dense layer, and each rank has half of the
experts. Both models see the same text in the same order. ``runs/moe/loss.svg`` has both curves;
training losses have the routers' balancing losses in them, those of the held-out text do not.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from pathlib import Path

import torch
from drivetrain_moe import upcycle
from torch import nn

import drivetrain
from drivetrain.engine.loader import RepeatingLoader

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # the quickstart's model and text

from gpt import GPT  # noqa: E402
from text_data import Windows, read_files, split, standard_library  # noqa: E402


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train a GPT with and without experts.")
    add = parser.add_argument
    add("--config", type=Path, default=HERE / "moe.json")
    add("--data", type=Path, nargs="+", metavar="PATH", help="text files, or folders of them")
    add("--out", type=Path, default=Path("runs/moe"), help="folder of all results")
    add("--steps", type=int, default=400, help="optimizer steps of each model")
    add("--experts", type=int, default=8, help="of each layer")
    add("--ep", type=int, default=2, help="ranks that share out the experts")
    add("--validation", type=int, default=128, metavar="WINDOWS", help="held out windows to score")
    add("--context", type=int, default=256, metavar="BYTES", help="length of a window")
    add("--layers", type=int, default=4)
    add("--width", type=int, default=128)
    add("--heads", type=int, default=4)
    return parser.parse_args()


def main() -> None:
    """Train both, draw their curves."""
    args = arguments()
    training, held_out = split(
        read_files(args.data) if args.data else standard_library(), args.context
    )
    curves: dict[str, tuple[list[float], float]] = {}
    for experts in (0, args.experts):
        name = f"{experts} experts, one a token" if experts else "dense"
        torch.manual_seed(0)
        model = GPT(args.context, args.layers, args.width, args.heads)
        if experts:
            # Nothing was learnt yet, so that experts begin apart: all neurons are drawn anew.
            upcycle(model, experts, k=1, ep_size=args.ep, reinitialise=1.0)
        curves[name] = train(name, model, training, held_out, args)
    if int(os.environ.get("RANK", "0")) == 0:
        draw(args.out / "loss.svg", curves)
        print(f"loss curves: {args.out / 'loss.svg'}")


def train(
    name: str, model: nn.Module, training: Windows, held_out: Windows, args: argparse.Namespace
) -> tuple[list[float], float]:
    """Bits per byte of every step, and of the held-out text at the end."""
    parameters = sum(p.numel() for p in model.parameters())
    engine, _, loader, _ = drivetrain.initialize(
        model=model,
        training_data=training,
        config=args.config,
        overlays=[
            f"scheduler.params.total_num_steps={args.steps}",
            f"scheduler.params.warmup_num_steps={max(1, args.steps // 10)}",
            f"moe.load.file={args.out / 'load.jsonl'}",
        ],
    )
    assert loader is not None
    batches, losses = RepeatingLoader(loader), []
    for step in range(1, args.steps + 1):
        losses.append(engine.train_batch(batches).item() / math.log(2))
        if engine.job.rank == 0 and (step % max(1, args.steps // 10) == 0 or step == args.steps):
            print(f"{name}: step {step} of {args.steps}, {losses[-1]:.3f} bits/byte", flush=True)
    validation = engine.deepspeed_io(held_out.at_most(args.validation), route="eval")
    windows = iter(validation)
    scores = [engine.eval_batch(windows).item() / math.log(2) for _ in range(len(validation))]
    bits = sum(scores) / len(scores)
    if engine.job.rank == 0:
        print(f"{name}: {parameters:,} parameters, held-out text: {bits:.3f} bits per byte")
    engine.destroy()
    return losses, bits


def draw(path: Path, curves: dict[str, tuple[list[float], float]]) -> None:
    """Write a picture of the training losses, and of the held-out text at the end."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.fonttype"] = "none"  # letters stay letters
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    for colour, (name, (losses, bits)) in zip(("tab:blue", "tab:red"), curves.items(), strict=True):
        steps = range(1, len(losses) + 1)
        axes.plot(steps, losses, linewidth=1, color=colour, label=f"{name}: training")
        label = f"held-out text: {bits:.3f}"
        axes.plot([len(losses)], [bits], "o", color=colour, label=label)
    axes.set(title="The same compute a token", xlabel="step", ylabel="bits per byte")
    axes.grid(visible=True, alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)


if __name__ == "__main__":
    main()
