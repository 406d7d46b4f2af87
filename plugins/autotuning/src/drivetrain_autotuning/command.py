"""``drivetrain tune``: the fastest config for a script, found by few trials."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from drivetrain_autotuning.section import PATH, AutotuningSection

if TYPE_CHECKING:
    from drivetrain_autotuning.foretold import Foretold
    from drivetrain_autotuning.space import Choice

_PLACE = "{config}"


@click.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.option("--nproc", type=click.IntRange(1), default=1, show_default=True, help="Ranks.")
@click.option("--model", metavar="M", help="For plans: see drivetrain plan.")
@click.option("--inputs", metavar="MODULE:FUNCTION", help="For plans: see drivetrain plan.")
@click.option("--sequence", type=click.IntRange(1), help="For plans: tokens of a sample.")
@click.option("--memory", help="Of a device, e.g. 80G; what needs more by its plan is not tried.")
@click.option("--device", type=click.Choice(["cpu", "gpu"]), default="gpu", show_default=True)
@click.option("--run", "run_best", is_flag=True, help="Run the script with the best config then.")
@click.argument("config")
@click.argument("script")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def tune(
    nproc: int,
    config: str,
    script: str,
    arguments: tuple[str, ...],
    run_best: bool,
    **plan: Any,
) -> None:
    """Find the values of CONFIG with which SCRIPT and its ARGUMENTS run fastest.

    In the arguments, {config} stands for the config of a trial. The section autotuning says what is
    tried. With --model, all configs are planned first, as by drivetrain plans: those that would not
    fit into --memory are left out, and the ones that should be fastest are tried first. What was
    tried is kept, so that a run that was ended goes on.
    """
    from drivetrain.plan.config.loading import load_config

    if not any(_PLACE in argument for argument in arguments):
        raise click.UsageError(
            f"no argument of {script} has {_PLACE}: write where it takes its config, e.g. "
            f"drivetrain tune {config} {script} --config '{_PLACE}'"
        )
    if plan["model"] is None and plan["memory"] is not None:
        raise click.UsageError("--memory is compared with plans, which need --model")
    merged = load_config(config)
    section = AutotuningSection.model_validate(merged.get(PATH) or {})
    if section.metric == "flops" and plan["model"] is None:
        raise click.UsageError("the metric flops counts operations of a plan: give --model")
    tuning = Tuning(merged, section, (script, *arguments), nproc, plan)
    tuning.run()
    best = tuning.best()
    if best is None:
        raise click.ClickException(tuning.failures())
    tuning.write(best)
    click.echo(f"best: {best.name}, {tuning.score(best):,.2f} by {section.metric}")
    click.echo(f"config, command and picture are in {section.results_dir}")
    if run_best:
        sys.exit(tuning.run_best(best))


@dataclass
class Tuning:
    """One search.

    Args:
        config: of the user.
        section: its section.
        script: file and arguments.
        ranks: processes of a trial.
        plan: options of ``drivetrain plan``.
        trials: what was tried, in order.
        refused: why choices are none -> how many.
    """

    config: Mapping[str, Any]
    section: AutotuningSection
    script: Sequence[str]
    ranks: int
    plan: Mapping[str, Any]
    trials: list[Any] = field(default_factory=list)
    refused: dict[str, int] = field(default_factory=dict)
    foretold: dict[str, Foretold] = field(default_factory=dict)

    def run(self) -> None:
        """Search."""
        from drivetrain_autotuning.search import search
        from drivetrain_autotuning.space import choices_in, possible, space_of

        if self.section.overwrite:
            shutil.rmtree(self.section.exps_dir, ignore_errors=True)
        Path(self.section.exps_dir).mkdir(parents=True, exist_ok=True)
        every = choices_in(space_of(self.config, self.section, self.ranks))
        choices, self.refused = possible(self.config, every, self.ranks, self.section)
        if not choices:
            raise click.ClickException(self.failures())
        click.echo(f"{len(choices)} configs, and {len(every) - len(choices)} that no job would run")
        expected = self._plan(choices) if self.plan["model"] is not None else None
        choices = [choice for choice in choices if not self._refused(choice)]
        if not choices:
            raise click.ClickException(self.failures())
        search(
            choices,
            self._try,
            how=self.section.tuner_type,
            most=self.section.tuner_num_trials,
            patience=self.section.tuner_early_stopping,
            foretold=expected,
        )

    def score(self, trial: Any) -> float:
        """Larger is better."""
        if self.section.metric == "latency":
            return 1.0 / float(trial.seconds)
        if self.section.metric == "flops":
            return self.foretold[trial.name].flops / float(trial.seconds)
        return float(trial.throughput)

    def best(self) -> Any | None:
        """The trial of the largest score; ``None`` if all failed."""
        worked = [trial for trial in self.trials if not trial.error]
        return max(worked, key=self.score, default=None)

    def failures(self) -> str:
        """What went wrong, the most frequent first."""
        found = Counter(trial.error for trial in self.trials) + Counter(self.refused)
        lines = [f"  {count} x {error}" for error, count in found.most_common()]
        return "\n".join(["no config works:", *lines])

    def table(self) -> str:
        """What was tried, the best first."""
        failed = [trial for trial in self.trials if trial.error]
        worked = [trial for trial in self.trials if not trial.error]
        lines = [f"{'score':>12}  {'samples/s':>12}  {'s a step':>10}  config"]
        lines += [
            f"{self.score(t):12,.4g}  {t.throughput:12,.2f}  {t.seconds:10.4f}  {t.name}"
            for t in sorted(worked, key=self.score, reverse=True)
        ]
        lines += [f"{'failed':>12}  {t.name}: {t.error}" for t in failed]
        return "\n".join(lines)

    def run_best(self, best: Any) -> int:
        """Run the script with the best config; return its exit code."""
        _, *words = self.write(best)
        command = [sys.executable, "-m", "drivetrain.cli", *words]
        return subprocess.run(command, check=False).returncode

    def write(self, best: Any) -> list[str]:
        """Write config, command, table and picture; return the command."""
        from drivetrain_autotuning.picture import picture
        from drivetrain_autotuning.space import config_of, initials_of
        from drivetrain_autotuning.trial import told

        folder = Path(self.section.results_dir)
        folder.mkdir(parents=True, exist_ok=True)
        config = config_of(self.config, tuple(best.choice.items()))
        config.pop(PATH, None)
        file = folder / "ds_config_optimal.json"
        file.write_text(json.dumps(config, indent=1), "utf-8")
        command = ["drivetrain", "run", "--nproc", str(self.ranks)]
        words = told(self.script, config, self.section.arg_mappings)
        command += [word.replace(_PLACE, str(file)) for word in words]
        (folder / "cmd_optimal.txt").write_text(shlex.join(command) + "\n", "utf-8")
        end = f"best: {best.name}, {self.section.metric}"
        (folder / "summary.txt").write_text(f"{self.table()}\n{end}\n", "utf-8")
        drawn = [(t.name, 0.0 if t.error else self.score(t), t.error) for t in self.trials]
        keys = {initials_of(path): path for path in best.choice}
        text = picture(drawn, best.name, self.section.metric, keys)
        (folder / "tried.svg").write_text(text, "utf-8")
        return command

    def _try(self, choice: tuple[tuple[str, Any], ...]) -> float | None:
        from drivetrain_autotuning.space import config_of, name_of
        from drivetrain_autotuning.trial import Trial, run_trial, told

        name, folder = name_of(choice), Path(self.section.exps_dir)
        config = config_of(self.config, choice)

        def run() -> Trial:
            made = Trial(name, dict(choice))
            options: dict[str, Any] = {"ranks": self.ranks, "timeout": self.section.timeout}
            words = told(self.script, config, self.section.arg_mappings)
            run_trial(made, config, words, folder=folder / name, **options)
            return made

        before = next((trial for trial in self.trials if trial.name == name), None)
        if before is not None:
            if before.runs == 1 and not before.error:
                before.add(run())
                before.write(folder)
                click.echo(f"     {name}, again: {before.throughput:,.2f} samples/s in the mean")
            return self.score(before)
        trial = Trial.read(folder, name)
        if trial is None or trial.choice != dict(choice):
            trial = run()
            trial.write(folder)
        self.trials.append(trial)
        line = trial.error or f"{trial.throughput:,.2f} samples/s, {trial.seconds:.4f} s a step"
        click.echo(f"{len(self.trials):3}  {name}: {line}")
        return None if trial.error else self.score(trial)

    def _plan(self, choices: Sequence[Choice]) -> dict[Choice, float]:
        """Plan all choices; returns the scores that are foretold."""
        from drivetrain_autotuning.foretold import foretell
        from drivetrain_autotuning.space import config_of, name_of

        click.echo(f"planning {len(choices)} configs")
        names = {name_of(choice): choice for choice in choices}
        configs = {name: config_of(self.config, choice) for name, choice in names.items()}
        for config in configs.values():
            config.pop(PATH, None)
        self.foretold = foretell(configs, self.plan, self.ranks, click.echo)
        found: dict[Choice, float] = {}
        for name, plan in self.foretold.items():
            per_step = {"throughput": float(plan.samples), "flops": plan.flops, "latency": 1.0}
            if plan.seconds > 0:
                found[names[name]] = per_step[self.section.metric] / plan.seconds
        return found

    def _refused(self, choice: Choice) -> bool:
        """Whether a choice's plan says that it does not run; noted as a trial that failed."""
        from drivetrain_autotuning.foretold import Foretold
        from drivetrain_autotuning.space import name_of
        from drivetrain_autotuning.trial import Trial

        found = self.foretold.get(name_of(choice))
        if found is None and self.section.metric == "flops":
            found = Foretold(name_of(choice), error="none, since plans ended before it")
        if found is None or (found.fits and not found.error):
            return False
        needs = f"needs {found.needs:,} bytes by its plan"
        error = f"its plan says: {found.error[-300:]}" if found.error else needs
        self.trials.append(Trial(found.name, dict(choice), error=error))
        return True
