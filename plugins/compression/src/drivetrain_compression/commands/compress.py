"""``drivetrain compress``: a model by a recipe; ``drivetrain compress compare``: two models."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import click

from drivetrain.cli import UserPath


class _ModelOrCommand(click.Group):
    """A group whose first argument is a model unless it is the name of a command."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ("-h", "--help"):
            args = ["model", *args]
        return super().parse_args(ctx, args)

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write_usage(ctx.command_path, "MODEL --recipe R.yaml --data D --out DIR")
        formatter.write_usage(ctx.command_path, "compare A B")
        formatter.write_usage(ctx.command_path, "gguf FOLDER FILE")


@click.group(cls=_ModelOrCommand)
def compress() -> None:
    """Compress MODEL by a recipe into a folder, or compare two models.

    MODEL is a folder of Transformers, whose blocks are in memory one at a time, or a GGUF file.
    After a kill the same command goes on where it was. See drivetrain compress model --help.
    """


@compress.command("model")
@click.argument("model", type=UserPath(path_type=Path))
@click.option(
    "--recipe", type=UserPath(path_type=Path), required=True, help="Modifiers, in YAML or JSON."
)
@click.option(
    "--data", type=UserPath(path_type=Path), help="Calibration: .txt, .jsonl or .safetensors."
)
@click.option("--out", type=UserPath(path_type=Path), required=True, help="Must not exist.")
@click.option(
    "--format",
    "layout",
    type=click.Choice(["compressed-tensors", "drivetrain", "plain"]),
    default="compressed-tensors",
    show_default=True,
    help="Layout of the files.",
)
@click.option("--samples", default=128, show_default=True, help="Rows of calibration data.")
@click.option("--length", default=512, show_default=True, help="Tokens of a row.")
@click.option("--rows", default=4, show_default=True, help="Rows that pass together.")
def model_command(
    model: Path,
    recipe: Path,
    data: Path | None,
    out: Path,
    layout: str,
    samples: int,
    length: int,
    rows: int,
) -> None:
    """Compress MODEL, a folder of Transformers or a GGUF file."""
    from drivetrain_compression.compressing import compress as run

    bar = _Bar()
    sizes = {"samples": samples, "length": length, "rows": rows}
    try:
        summary = run(model, recipe, data, out, format=layout, report=bar, **sizes)
    finally:
        bar.close()
    size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    click.echo(f"{out}: {size / 1e6:,.1f} MB in {bar.seconds:,.0f} s")
    for note in summary["notes"]:
        click.echo(f"note: {note}")


class _Bar:
    """One line on a terminal that says what passes; nothing elsewhere."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._shown = False

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self._began

    def __call__(self, what: str, done: int, total: int) -> None:
        if sys.stderr.isatty():
            full = 20 * done // max(total, 1)
            text = f"[{'#' * full}{' ' * (20 - full)}] {done}/{total} {what} {self.seconds:,.0f} s"
            click.echo(f"\r\033[K{text}", nl=False, err=True)
            self._shown = True

    def close(self) -> None:
        """Go to the next line."""
        if self._shown:
            click.echo("", err=True)


@compress.command()
@click.argument("first", type=UserPath(exists=True, path_type=Path))
@click.argument("second", type=UserPath(exists=True, path_type=Path))
@click.option(
    "--data", type=UserPath(path_type=Path), help="Text or rows to measure perplexity and speed on."
)
@click.option("--samples", default=8, show_default=True, help="Rows of it.")
@click.option("--length", default=256, show_default=True, help="Tokens of a row.")
@click.option("--picture", type=UserPath(path_type=Path), help="Draw the comparison, as SVG.")
def compare(
    first: Path, second: Path, data: Path | None, samples: int, length: int, picture: Path | None
) -> None:
    """Compare the models in FIRST and SECOND: size, error per layer, perplexity, speed."""
    from drivetrain_compression.commands.comparison import compared, drawing, table

    found: Any = compared(first, second, data, samples=samples, length=length)
    click.echo(table(found))
    if picture is not None:
        picture.write_text(drawing(found), "utf-8")
        click.echo(f"picture: {picture}")


@compress.command("gguf")
@click.argument("folder", type=UserPath(exists=True, path_type=Path))
@click.argument("file", type=UserPath(path_type=Path))
@click.option(
    "--rest",
    type=click.Choice(["BF16", "F16", "Q8_0", "Q4_0", "Q4_1", "Q4_K"]),
    default="BF16",
    show_default=True,
    help="Kind of matrices that are on no grid of GGUF.",
)
@click.option("--pre", default="default", show_default=True, help="How llama.cpp splits text.")
def gguf_command(folder: Path, file: Path, rest: str, pre: str) -> None:
    """Write the model in FOLDER, in the format drivetrain or plain, to a GGUF FILE."""
    from drivetrain_compression.files.gguf_file import write_gguf

    write_gguf(folder, file, rest=rest, pre=pre)
    click.echo(f"{file}: {file.stat().st_size / 1e6:,.1f} MB")
