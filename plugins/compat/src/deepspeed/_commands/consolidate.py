"""``zero_to_fp32``: whole fp32 weights of a checkpoint."""

from __future__ import annotations

import click

from deepspeed._surface import lookup
from drivetrain.cli import Failure
from drivetrain.errors import DrivetrainError


@click.command()
@click.argument("checkpoint_dir")
@click.argument("output_dir")
@click.option("--max_shard_size", default="5GB", show_default=True, help="Largest file.")
@click.option("--safe_serialization", is_flag=True, help="Write safetensors.")
@click.option("-t", "--tag", help="Which checkpoint of the folder; default: the latest.")
@click.option("--exclude_frozen_parameters", is_flag=True, help="Refused, see the error.")
@click.option("-d", "--debug", is_flag=True, help="Accepted, has no effect.")
def main(checkpoint_dir: str, output_dir: str, debug: bool, **options: object) -> None:
    """Write the weights of CHECKPOINT_DIR, of ours or of DeepSpeed, into the folder OUTPUT_DIR."""
    convert = lookup.load("utils.zero_to_fp32.convert_zero_checkpoint_to_fp32_state_dict")
    try:
        convert(checkpoint_dir, output_dir, **options)
    except DrivetrainError as error:
        raise Failure(error) from error
    click.echo(f"wrote fp32 weights of {checkpoint_dir} to {output_dir}")
