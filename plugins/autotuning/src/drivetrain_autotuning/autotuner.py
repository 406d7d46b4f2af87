"""``deepspeed.autotuning.Autotuner``: the tuner for scripts that launch it themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import click

from drivetrain.errors import ConfigError
from drivetrain.plan.config.loading import load_config
from drivetrain_autotuning.command import Tuning
from drivetrain_autotuning.section import PATH, AutotuningSection

_CONFIG_OPTIONS = ("--deepspeed_config", "--deepspeed", "--ds_config")


class LaunchArguments(Protocol):
    """What of the launcher's arguments counts."""

    user_script: str
    user_args: Sequence[str]


class Autotuner:
    """Finds the values of a script's config with which it runs fastest.

    The same search as ``drivetrain tune``, from the launcher's arguments.

    Args:
        args: ``user_script``, and ``user_args`` in which the config's file follows one of
            ``--deepspeed_config``, ``--deepspeed`` and ``--ds_config``.
        active_resources: host -> its devices; a trial has a rank on each of them.

    Attributes:
        exps_dir: folder with what was tried.
        results_dir: folder of the best config, the command that runs it, and a table.

    Raises:
        ConfigError: there are several hosts, no device, or no config.
    """

    def __init__(
        self, args: LaunchArguments, active_resources: Mapping[str, Sequence[int]]
    ) -> None:
        if len(active_resources) != 1:
            hosts = ", ".join(active_resources) or "none"
            raise ConfigError(f"trials run on one host, and these were given: {hosts}")
        ranks = len(next(iter(active_resources.values())))
        if not ranks:
            raise ConfigError("the host has no devices, so a trial would have no rank")
        config, words = _followed(args.user_args)
        merged = load_config(config)
        section = AutotuningSection.model_validate(merged.get(PATH) or {})
        if section.metric == "flops":
            raise ConfigError(
                "the metric flops counts operations of a plan: drivetrain tune --model M has one"
            )
        self.exps_dir, self.results_dir = section.exps_dir, section.results_dir
        plan = dict.fromkeys(("model", "inputs", "sequence", "memory", "device"))
        self._tuning = Tuning(merged, section, (args.user_script, *words), ranks, plan)

    def metric(self) -> str:
        """What is compared: ``throughput`` or ``latency``."""
        return self._tuning.section.metric

    def tune(self) -> None:
        """Search.

        Raises:
            ConfigError: no config works; with what went wrong, the most frequent first.
        """
        try:
            self._tuning.run()
        except click.ClickException as error:
            raise ConfigError(error.message) from error
        if self._tuning.best() is None:
            raise ConfigError(self._tuning.failures())

    def print_tuning_results(self) -> None:
        """Print what was tried, the best first."""
        click.echo(self._tuning.table())

    def write_optimal_config(self) -> None:
        """Write the best config, the command that runs it, the table and a picture."""
        self._tuning.write(self._best())

    def run_after_tuning(self) -> int:
        """Run the script with the best config; return its exit code.

        Raises:
            ConfigError: nothing was tried, or nothing works.
        """
        return self._tuning.run_best(self._best())

    def _best(self) -> Any:
        best = self._tuning.best()
        if best is None:
            raise ConfigError("there is no best config: call tune() first")
        return best


def _followed(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """The config's file, and the arguments with ``{config}`` in its place."""
    words = list(arguments)
    for place, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name in _CONFIG_OPTIONS:
            file = value if equals else next(iter(words[place + 1 :]), "")
            if Path(file).is_file():  # not as in `--deepspeed --deepspeed_config FILE`
                words[place if equals else place + 1] = (
                    f"{name}={{config}}" if equals else "{config}"
                )
                return file, words
    raise ConfigError(
        f"none of {', '.join(_CONFIG_OPTIONS)} in the script's arguments is followed by the file "
        "of a config"
    )
