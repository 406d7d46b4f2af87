"""``drivetrain elastic``: which numbers of ranks a config's global batch fits."""

from __future__ import annotations

from pathlib import Path

import click

from drivetrain.cli import UserPath


@click.command()
@click.argument("config", type=UserPath(path_type=Path))
@click.option("-w", "--world-size", default=0, help="Show the micro-batch of so many ranks, too.")
def elastic(config: Path, world_size: int) -> None:
    """Show the global batch of CONFIG's section elasticity, and the numbers of ranks that fit."""
    from drivetrain.plan.config.loading import load_config
    from drivetrain_elasticity.batches import compute_elastic_config

    batch, sizes, *micro = compute_elastic_config(load_config(config), world_size=world_size)
    click.echo(f"global batch: {batch}")
    click.echo(f"numbers of ranks ({len(sizes)}): {', '.join(map(str, sizes))}")
    if micro:
        click.echo(f"with {world_size} ranks: micro-batch {micro[0]}")
