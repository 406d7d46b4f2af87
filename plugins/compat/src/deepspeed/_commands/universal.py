"""``ds_to_universal``: a checkpoint that loads into any layout."""

from __future__ import annotations

from pathlib import Path

import click

from deepspeed._surface import lookup
from drivetrain.checkpoint.format.index import MANIFEST
from drivetrain.cli import Failure
from drivetrain.errors import DrivetrainError


@click.command()
@click.option("--input_folder", required=True, help="A run's folder, or a checkpoint's.")
@click.option("--output_folder", required=True, help="Of the new checkpoint.")
@click.option("--num_extract_workers", default=4, help="Accepted, has no effect.")
@click.option("--num_merge_workers", default=2, help="Accepted, has no effect.")
@click.option("--keep_temp_folder", is_flag=True, help="Accepted, has no effect.")
@click.option("--no_strict", is_flag=True, help="Accepted, has no effect.")
@click.option("--inject_missing_state", is_flag=True, help="Accepted, has no effect.")
def main(input_folder: str, output_folder: str, **_: object) -> None:
    """Make a checkpoint of DeepSpeed one that loads into any layout.

    Those of ours do as they are, so this is for DeepSpeed's alone; `engine.load_checkpoint` loads
    them without it, too.
    """
    folder, given = Path(output_folder), Path(input_folder)
    if any(given.glob(MANIFEST)) or any(given.glob(f"*/{MANIFEST}")):
        raise click.ClickException(
            f"{input_folder} is a checkpoint of ours, which loads into any layout: use it as it is"
        )
    try:
        lookup.load("checkpoint.import_deepspeed")(input_folder, str(folder.parent), folder.name)
    except DrivetrainError as error:
        raise Failure(error) from error
    click.echo(f"converted {input_folder} to {output_folder}")
