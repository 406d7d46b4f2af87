"""``drivetrain build``: compile native code ahead of time."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from drivetrain.cli import UserPath
from drivetrain.errors import BuildError
from drivetrain_kernels.native.library import NativeLibrary
from drivetrain_kernels.provider import Provider, served_device_types
from drivetrain_kernels.registry import registry


@click.command("build")
@click.option("--all", "everything", is_flag=True, help="Every variant that compiles here.")
@click.option(
    "--output",
    type=UserPath(file_okay=False, path_type=Path),
    help="Also copy the binaries into this folder, to ship them in a wheel.",
)
def build(everything: bool, output: Path | None) -> None:
    """Build the native code of all installed packages into the per-user cache.

    Builds what this machine uses; with --all every instruction set and architecture that the
    compilers here can make. Exits with status 1 if anything fails, after trying all of it.
    """
    if output is not None:
        _make(output)
    failed = False
    for device_type in served_device_types():
        for provider in registry.providers(device_type):
            failed |= not _build(provider, everything, output)
    sys.exit(1 if failed else 0)


def _build(provider: Provider, everything: bool, output: Path | None) -> bool:
    """Build one provider's libraries; answers whether all went well."""
    sound = True
    for library in provider.libraries if everything else provider.used:
        try:
            path = library.ensure_built() if output is None else _ship(library, output)
        except BuildError as error:
            sound = False
            click.echo(f"{provider}: {library.name}: {error}", err=True)
        else:
            click.echo(f"{provider}: {library.name}: {library.origin} ({path})")
    return sound


def _make(output: Path) -> None:
    """Make the folder before anything is built for it."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BuildError(f"--output {output} cannot be made: {error.strerror}") from error


def _ship(library: NativeLibrary, output: Path) -> Path:
    library.ensure_built()
    try:
        return library.ship(output)
    except OSError as error:
        raise BuildError(f"it cannot be copied to {output}: {error.strerror}") from error
