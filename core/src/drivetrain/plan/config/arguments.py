"""Command-line arguments that a training script may offer its users."""

from __future__ import annotations

from argparse import ArgumentParser


def add_config_arguments(parser: ArgumentParser) -> ArgumentParser:
    """Add ``--drivetrain-config`` and ``--set``, and the spellings that DeepSpeed scripts pass.

    ``drivetrain.initialize(args=...)`` reads ``args.deepspeed_config`` and ``args.overlays``.

    Args:
        parser: the script's parser; changed and returned.
    """
    group = parser.add_argument_group("Drivetrain")
    group.add_argument(
        "--drivetrain-config",
        "--deepspeed_config",
        dest="deepspeed_config",
        metavar="FILE",
        help="config file, JSON (comments allowed) or YAML",
    )
    group.add_argument(
        "--set",
        dest="overlays",
        action="append",
        default=[],
        metavar="PATH=VALUE",
        help="replace one value of the config, e.g. zero_optimization.stage=2; may be repeated",
    )
    group.add_argument(
        "--deepspeed", action="store_true", help="accepted for existing scripts; has no effect"
    )
    return parser
