"""What a person sees of a training run: a progress bar, or lines in a log, and the loss curve."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LINES = 10
"""Lines per run where no progress bar can be shown."""


class Display:
    """A progress bar on a terminal; elsewhere a line every now and then.

    Args:
        console: where to; a quiet one shows nothing.
        start: steps done already.
        total: steps in all.
        tokens: tokens per step.
    """

    def __init__(self, console: Console, *, start: int, total: int, tokens: int) -> None:
        self._console = console
        self._start, self._total, self._tokens = start, total, tokens
        self._every = max(1, (total - start) // LINES)
        self._began = time.perf_counter()
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("training", total=total, completed=start, facts="")

    def __enter__(self) -> Display:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def update(self, step: int, bits: float) -> None:
        """Show that ``step`` is done with a loss of ``bits`` per byte."""
        seconds = time.perf_counter() - self._began
        rate = (step - self._start) * self._tokens / seconds
        facts = f"loss {bits:.3f} bits/byte, {rate:,.0f} tokens/s"
        self._bar.update(self._task, completed=step, facts=facts)
        if not self._console.is_terminal and (step % self._every == 0 or step == self._total):
            left = (self._total - step) * self._tokens / rate
            self._console.print(f"step {step} of {self._total}: {facts}, {left:.0f} s left")


def draw_curve(path: Path, losses: Sequence[float], before: float | None, after: float) -> None:
    """Write a picture of the training loss.

    Args:
        path: a PNG file.
        losses: bits per byte of every step.
        before: bits per byte of the held-out text before training, where it was measured.
        after: the same at the end.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    steps = range(1, len(losses) + 1)
    axes.plot(steps, losses, linewidth=1, color="tab:blue", label="training")
    held_out = {len(losses): after} if before is None else {0: before, len(losses): after}
    axes.plot(*zip(*held_out.items(), strict=True), "o", color="tab:red", label="held-out text")
    axes.set(xlabel="step", ylabel="bits per byte", ylim=(0, 8.5))
    axes.grid(visible=True, alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
