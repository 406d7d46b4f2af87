"""Train a byte-level GPT on real text: the sources of Python's standard library, or your files.

    drivetrain run --nproc 2 examples/train_gpt.py --config examples/gpt.json
    drivetrain run --nproc 4 examples/train_gpt.py --config examples/pipeline_gpt.json
    drivetrain run --nproc 2 examples/train_gpt.py --config examples/tensor_gpt.json
    drivetrain run --nproc 4 examples/train_gpt.py --config examples/pipeline_tensor_gpt.json

The second splits the model over two stages and the text over two shards, the third shares out each
layer over two ranks, and the last does both.
Ctrl-C ends the run after the step under way and saves it; --resume goes on from there.
"""

from __future__ import annotations

import argparse
import math
import os
import shlex
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from gpt import GPT
from rich.console import Console
from text_data import read_files, split, standard_library
from training_display import Display, draw_curve

import drivetrain
from drivetrain.contracts import Purpose, Tag
from drivetrain.engine.loader import DataLoader, RepeatingLoader
from drivetrain.errors import DrivetrainError

PROMPT = b"import os\n\n\ndef "
"""What the text sample begins with."""


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train a byte-level GPT on text.")
    add = parser.add_argument
    add("--config", type=Path, default=Path(__file__).with_name("gpt.json"))
    add("--set", dest="overlays", action="append", default=[], metavar="PATH=VALUE")
    add("--data", type=Path, nargs="+", metavar="PATH", help="text files, or folders of them")
    add("--out", type=Path, default=Path("runs/gpt"), help="folder of all results")
    add("--resume", action="store_true", help="go on from the latest checkpoint in --out")
    add("--steps", type=int, default=400, help="optimizer steps of the whole run")
    add("--save-every", type=int, default=100, metavar="STEPS")
    add("--validation", type=int, default=128, metavar="WINDOWS", help="held out windows to score")
    add("--sample", type=int, default=400, metavar="BYTES", help="length of the text sample")
    add("--context", type=int, default=256, metavar="BYTES", help="length of a window")
    add("--layers", type=int, default=4)
    add("--width", type=int, default=128)
    add("--heads", type=int, default=4)
    return parser.parse_args()


def main() -> None:
    """Prepare, train, look at the result."""
    args = arguments()
    checkpoints = output_folder(args)
    text = read_files(args.data) if args.data else standard_library()
    training, held_out = split(text, args.context)
    torch.manual_seed(0)  # ranks take rank 0's weights, but one process should repeat itself, too
    model = GPT(args.context, args.layers, args.width, args.heads)
    parameters = sum(p.numel() for p in model.parameters())
    engine, _, loader, _ = drivetrain.initialize(
        model=model,
        training_data=training,
        config=args.config,
        overlays=[*schedule(args.steps), *args.overlays],
    )
    assert loader is not None
    validation = engine.deepspeed_io(held_out.at_most(args.validation), route="eval")
    console = Console(quiet=engine.job.rank > 0, highlight=False, soft_wrap=True)
    console.print(
        f"{parameters:,} parameters, {len(text):,} bytes of text, {engine.job.world_size} ranks"
    )
    run = Run(engine, checkpoints)
    if args.resume:
        console.print(f"resumed from {run.resume()}")
    else:
        run.bits_before = bits_per_byte(engine, validation)
        console.print(f"held-out text before training: {run.bits_before:.3f} bits per byte")

    if not run.train(loader, args, console):
        console.print(
            f"stopped by {run.stop.name} after step {engine.global_steps}, which is saved"
        )
        console.print(f"go on with: {resume_command(engine.job.world_size)}")
    else:
        bits_after = bits_per_byte(engine, validation)
        console.print(f"held-out text after training: {bits_after:.3f} bits per byte")
        with drivetrain.whole(engine.module):  # one rank writes, with parameters of all
            if engine.job.rank == 0:
                show_results(engine, run, bits_after, args, console)
    engine.destroy()


class Run:
    """The state of a training run beside the engine's, saved with its checkpoints.

    Args:
        engine: what is trained.
        folder: of the checkpoints.
    """

    def __init__(self, engine: drivetrain.Engine, folder: Path) -> None:
        self.engine = engine
        self.folder = folder
        self.losses: list[float] = []
        self.bits_before: float | None = None
        self.stop = StopRequest()

    def train(self, loader: DataLoader, args: argparse.Namespace, console: Console) -> bool:
        """Train to the last step, or until somebody asks to stop; whether it was the last."""
        engine, batches = self.engine, RepeatingLoader(loader)
        tokens = engine.train_batch_size() * args.context
        display = Display(console, start=engine.global_steps, total=args.steps, tokens=tokens)
        saved_at = engine.global_steps
        with self.stop, display:
            while engine.global_steps < args.steps:
                loss = engine.train_batch(batches)
                self.losses.append(loss.item() / math.log(2))
                display.update(engine.global_steps, self.losses[-1])
                stopping = self.stop.agreed(engine)
                if stopping or engine.global_steps % args.save_every == 0:
                    saved_at = self.save()
                if stopping:
                    return engine.global_steps == args.steps
            if saved_at != engine.global_steps:
                self.save()
        return True

    def save(self) -> int:
        """Save everything, and answer the step at which this was."""
        state = {"losses": self.losses, "bits_before": self.bits_before}
        self.engine.save_checkpoint(str(self.folder), client_state=state)
        return self.engine.global_steps

    def resume(self) -> str:
        """Continue the latest checkpoint; answers its path."""
        path, state = self.engine.load_checkpoint(str(self.folder))
        if path is None or state is None:
            raise DrivetrainError(f"--resume: there is no checkpoint in {self.folder}")
        self.losses, self.bits_before = state["losses"], state["bits_before"]
        return path


class StopRequest:
    """SIGINT or SIGTERM as a wish to stop after the step under way; a second one does not wait."""

    def __init__(self) -> None:
        self.name = ""
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._remember)

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name
        self.__exit__()

    def agreed(self, engine: drivetrain.Engine) -> bool:
        """Whether any rank was asked to stop; signals reach the ranks at different moments."""
        votes = torch.tensor([float(bool(self.name))], device=engine.device)
        tag = Tag(Purpose.CONTROL, site="stop request")
        engine.job.communicator.all_reduce(votes, "world", tag)
        self.name = self.name or ("another rank" if votes.item() else "")
        return votes.item() > 0


def schedule(steps: int) -> list[str]:
    """The learning rate's schedule for a run of ``steps``, on top of the config."""
    if steps < 2:
        raise DrivetrainError(f"--steps: expected at least 2, got {steps}")
    path = "scheduler.params"
    return [f"{path}.total_num_steps={steps}", f"{path}.warmup_num_steps={max(1, steps // 10)}"]


def bits_per_byte(engine: drivetrain.Engine, loader: DataLoader) -> float:
    """Mean loss over a loader's windows, in bits."""
    batches = iter(loader)
    losses = [engine.eval_batch(batches).item() for _ in range(len(loader))]
    return sum(losses) / len(losses) / math.log(2)


def show_results(
    engine: drivetrain.Engine,
    run: Run,
    bits_after: float,
    args: argparse.Namespace,
    console: Console,
) -> None:
    """Draw the loss curve and let the model write, where one rank has all of it."""
    picture, sample = args.out / "loss.png", args.out / "sample.txt"
    draw_curve(picture, run.losses, run.bits_before, bits_after)
    if engine.job.mesh.size("pp") > 1 or engine.job.mesh.size("tp") > 1:
        console.print(f"checkpoint, which any layout loads: {run.folder}\nloss curve: {picture}")
        return
    text = engine.module.write(PROMPT, args.sample).decode("utf-8", errors="replace")
    sample.write_text(text, "utf-8")
    console.rule("the model writes")
    console.print(text, markup=False)
    console.rule()
    console.print(f"checkpoint: {run.folder}\nloss curve: {picture}\ntext sample: {sample}")


def output_folder(args: argparse.Namespace) -> Path:
    """The checkpoints' folder, checked before anything expensive.

    Raises:
        DrivetrainError: it cannot be written, or holds nothing to resume from.
    """
    checkpoints: Path = args.out / "checkpoints"
    if args.resume and not (checkpoints / "latest").is_file():
        raise DrivetrainError(
            f"--resume: there is no checkpoint in {checkpoints}; leave --resume out to begin, or "
            "name the folder of the run with --out"
        )
    try:
        checkpoints.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DrivetrainError(f"--out: cannot create {checkpoints}: {error.strerror}") from error
    if not os.access(checkpoints, os.W_OK | os.X_OK):
        raise DrivetrainError(f"--out: {checkpoints} cannot be written: permission denied")
    return checkpoints


def resume_command(ranks: int) -> str:
    """What the user types to go on with this run."""
    words = [word for word in sys.argv if word != "--resume"]
    return shlex.join(["drivetrain", "run", "--nproc", str(ranks), *words, "--resume"])


if __name__ == "__main__":
    main()
