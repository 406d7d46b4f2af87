"""``drivetrain tune``: searches over surfaces that are known, and trials of a real script."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from drivetrain_autotuning import Autotuner
from drivetrain_autotuning.search import search
from drivetrain_autotuning.section import AutotuningSection
from drivetrain_autotuning.space import choices_in, config_of, possible, space_of
from drivetrain_autotuning.trial import Trial, told
from drivetrain_cli.planning.machine_table import MachineTable, usual_place
from pydantic import ValidationError

from drivetrain.cli import main
from drivetrain.errors import ConfigError
from drivetrain.plan.registry import Registry

SCRIPT = """
import argparse, time
now = [0.0]
time.perf_counter = lambda: now[0]  # steps take what the script says, on a busy machine, too
import torch, drivetrain
parser = argparse.ArgumentParser()
parser.add_argument("--config")
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--fails", default="")
given = parser.parse_args()
if given.fails:
    raise RuntimeError(given.fails)
engine, *_ = drivetrain.initialize(model=torch.nn.Linear(8, 8), config=given.config)
for _ in range(given.steps):
    samples = engine.train_micro_batch_size_per_gpu()
    for _ in range(engine.gradient_accumulation_steps()):
        now[0] += 0.02 if samples < 8 else 0.1
        engine.backward(engine(torch.randn(samples, 8)).square().mean())
        engine.step()
"""
CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 2,
    "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
    "autotuning": {
        "enabled": True,
        "max_train_micro_batch_size_per_gpu": 8,
        "start_profile_step": 2,
        "end_profile_step": 3,
    },
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "train.py").write_text(SCRIPT)
    (tmp_path / "job.json").write_text(json.dumps(CONFIG))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    # Plans need not measure the machine then; an operator takes long enough that all else is less.
    MachineTable({}, overhead=1e-3).write(usual_place())
    return tmp_path


def tune(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["tune", *arguments])


def run(*more: str) -> Result:
    return tune("job.json", "train.py", "--config", "{config}", *more)


# -- a real script -----------------------------------------------------------------------------


def test_the_fastest_config_is_written_and_goes_on(folder: Path) -> None:
    result = run()
    assert result.exit_code == 0, result.output
    best = json.loads((folder / "autotuning_results" / "ds_config_optimal.json").read_text())
    assert best["train_micro_batch_size_per_gpu"] == 4
    assert "200.00 samples/s, 0.0200 s a step" in result.output  # against 80 and 100
    assert "autotuning" not in best
    command = (folder / "autotuning_results" / "cmd_optimal.txt").read_text()
    assert command.startswith("drivetrain run --nproc 1 train.py --config ")
    drawn = (folder / "autotuning_results" / "tried.svg").read_text()
    assert drawn.count("<rect") == 4
    assert "3 trials in their order, samples a second" in drawn
    assert ">tmbspg: train_micro_batch_size_per_gpu<" in drawn
    kept = {file.name: file.read_text() for file in (folder / "autotuning_exps").glob("*.json")}
    assert len(kept) == 3
    (folder / "train.py").write_text("raise SystemExit('must not run')")
    assert run().exit_code == 0
    assert kept == {f.name: f.read_text() for f in (folder / "autotuning_exps").glob("*.json")}


def test_latency_is_smaller_with_less_to_do(folder: Path) -> None:
    section = {
        **CONFIG["autotuning"],
        "metric": "latency",
        "space": {"gradient_accumulation_steps": [1, 3]},
    }
    (folder / "job.json").write_text(json.dumps({**CONFIG, "autotuning": section}))
    assert run().exit_code == 0
    best = json.loads((folder / "autotuning_results" / "ds_config_optimal.json").read_text())
    assert best["gradient_accumulation_steps"] == 1


def test_errors_of_trials_that_all_fail_are_summed_up(folder: Path) -> None:
    result = run("--fails", "no such flux capacitor")
    assert result.exit_code == 1
    assert "no config works:" in result.output
    assert "3 x " in result.output
    assert "no such flux capacitor" in result.output


def test_running_out_of_memory_is_a_result(folder: Path) -> None:
    result = run("--fails", "CUDA out of memory. Tried to allocate 2 GiB")
    assert "3 x out of memory" in result.output


def test_a_script_that_ends_early_and_one_that_hangs_are_told(folder: Path) -> None:
    assert "give it more to do" in run("--steps", "1").output
    (folder / "train.py").write_text("import time; time.sleep(60)")
    section = {**CONFIG["autotuning"], "timeout": 3, "overwrite": True, "tuner_num_trials": 1}
    (folder / "job.json").write_text(json.dumps({**CONFIG, "autotuning": section}))
    assert "no end after 3 s" in run().output


def test_what_does_not_fit_by_its_plan_is_not_run(folder: Path) -> None:
    (folder / "of_tuning.py").write_text(
        "import torch\ndef make():\n    return torch.nn.Linear(8, 8)\n"
        "def rows(samples, _):\n    return torch.zeros(samples, 8)\n"
    )
    plan = ["--model", "of_tuning:make", "--inputs", "of_tuning:rows", "--memory", "100"]
    result = tune(*plan, "--device", "cpu", "job.json", "train.py", "--config", "{config}")
    assert result.exit_code == 1
    assert "bytes by its plan" in result.output
    assert not list((folder / "autotuning_exps").rglob("output.log"))


def test_options_that_plans_do_not_take_are_told(folder: Path) -> None:
    plan = ["--model", "no_such:make", "--memory", "9X"]
    result = tune(*plan, "job.json", "train.py", "--config", "{config}")
    assert result.exit_code == 1
    assert "no config could be planned" in result.output
    assert "'9X' is no size" in result.output


def test_flops_need_a_plan_of_each_config(folder: Path) -> None:
    """What a model prints is no plan; what it raises is told of each config."""
    (folder / "of_tuning.py").write_text(
        "import torch\ndef make():\n    print({'layers': 2})\n    raise ValueError('no model')\n"
    )
    section = {**CONFIG["autotuning"], "metric": "flops"}
    (folder / "job.json").write_text(json.dumps({**CONFIG, "autotuning": section}))
    plan = ["--model", "of_tuning:make", "--device", "cpu"]
    result = tune(*plan, "job.json", "train.py", "--config", "{config}")
    assert result.exit_code == 1
    assert "3 x its plan says: " in result.output
    assert "no model" in result.output


def test_what_is_fastest_by_its_plan_is_tried_first(folder: Path) -> None:
    (folder / "of_tuning.py").write_text(
        "import torch\ndef make():\n    return torch.nn.Linear(8, 8)\n"
        "def rows(samples, _):\n    return torch.zeros(samples, 8)\n"
    )
    plan = ["--model", "of_tuning:make", "--inputs", "of_tuning:rows", "--device", "cpu"]
    section = {**CONFIG["autotuning"], "tuner_num_trials": 1}
    (folder / "job.json").write_text(json.dumps({**CONFIG, "autotuning": section}))
    result = tune(*plan, "job.json", "train.py", "--config", "{config}")
    assert result.exit_code == 0, result.output
    assert "planning 3 configs" in result.output
    # Without plans the first would be that in the middle. So small a layer takes the same time for
    # any number of rows, and by its plan, too.
    tried = [line.split()[1] for line in result.output.splitlines() if "samples/s," in line]
    assert tried == ["tmbspg8:"]


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["job.json", "train.py"], "no argument of train.py has {config}"),
        (["--memory", "9G", "job.json", "train.py", "{config}"], "--memory is compared with plans"),
        (["no.json", "train.py", "{config}"], "no.json"),
    ],
    ids=str,
)
def test_what_is_wrong_is_said(arguments: list[str], hint: str, folder: Path) -> None:
    result = tune(*arguments)
    assert result.exit_code == 2
    assert hint in " ".join(result.output.split())


def test_steps_are_in_order() -> None:
    with pytest.raises(ValidationError, match="before start_profile_step"):
        AutotuningSection(start_profile_step=9, end_profile_step=5)


# -- spaces ------------------------------------------------------------------------------------


def test_accumulation_follows_from_the_global_batch() -> None:
    given = {"train_batch_size": 32, "gradient_accumulation_steps": 8}
    made = config_of(given, (("train_micro_batch_size_per_gpu", 4),))
    assert made == {"train_batch_size": 32, "train_micro_batch_size_per_gpu": 4}


def test_choices_that_no_job_would_run_are_refused_with_their_reason() -> None:
    given = {"train_batch_size": 32, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}}
    choices = choices_in({"train_micro_batch_size_per_gpu": [4, 5]})
    left, reasons = possible(given, choices, 2, AutotuningSection())
    assert left == choices[:1]
    assert len(reasons) == 1


def test_usual_spaces_have_the_stages_that_the_config_names() -> None:
    section = AutotuningSection(num_tuning_micro_batch_sizes=2)
    space = space_of({"zero_optimization": {"stage": "all"}}, section)
    assert space == {
        "train_micro_batch_size_per_gpu": [8, 4],
        "zero_optimization.stage": [0, 1, 2, 3],
    }
    assert space_of({}, section).keys() == {"train_micro_batch_size_per_gpu"}


def test_slow_searches_also_try_accumulation_and_axes_that_the_config_names() -> None:
    section = AutotuningSection(num_tuning_micro_batch_sizes=1, fast=False)
    installed = {*Registry.installed().names("plugins")}
    named = {
        "tensor_parallel": {"tp": {"tp_size": 2}},
        "pipeline": {"stages": 1},
        "sequence_parallel_size": 2,
        "moe": {},
        "gradient_accumulation_steps": 3,
    }
    space = space_of(named, section, ranks=6)
    assert space["gradient_accumulation_steps"] == [3, 6, 12]
    paths = {
        "tensor_parallel": "tensor_parallel.tp.tp_size",
        "pipeline": "pipeline.stages",
        "sequence_parallel_size": "sequence_parallel_size",
        "moe": "moe.ep_size",
    }
    for owner, path in paths.items():
        assert space.get(path) == ([1, 2, 3, 6] if owner in installed else None)
    assert not {*paths.values()} & {*space_of(named, section, ranks=1)}
    assert not {*paths.values()} & {*space_of({}, section, ranks=6)}
    assert "gradient_accumulation_steps" not in space_of({"train_batch_size": 8}, section)


# -- from a script ------------------------------------------------------------------------------


def arguments(*words: str) -> SimpleNamespace:
    return SimpleNamespace(user_script="train.py", user_args=list(words))


def test_a_script_tunes_by_itself(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text = SCRIPT.replace('"--config"', '"--deepspeed_config", dest="config"')
    (folder / "train.py").write_text(text + "\nprint('trained with', samples)\n")
    tuner = Autotuner(arguments("--deepspeed_config", "job.json"), {"localhost": [0]})
    assert tuner.metric() == "throughput"
    tuner.tune()
    tuner.print_tuning_results()
    tuner.write_optimal_config()
    best = json.loads((folder / tuner.results_dir / "ds_config_optimal.json").read_text())
    assert best["train_micro_batch_size_per_gpu"] == 4
    assert tuner.run_after_tuning() == 0
    shown = capfd.readouterr().out
    rows = [line.split() for line in shown.splitlines() if line.endswith(("tmbspg4", "tmbspg8"))]
    assert rows[-2][-1] == "tmbspg4"  # the best first
    assert "trained with 4" in shown


def test_a_script_is_told_what_does_not_work(folder: Path) -> None:
    given = arguments("--deepspeed_config=job.json", "--fails", "no flux")
    with pytest.raises(ConfigError, match="trials run on one host"):
        Autotuner(given, {"a": [0], "b": [0]})
    with pytest.raises(ConfigError, match="no devices"):
        Autotuner(given, {"a": []})
    with pytest.raises(ConfigError, match="none of --deepspeed_config"):
        Autotuner(arguments("--deepspeed"), {"a": [0]})
    tuner = Autotuner(given, {"a": [0]})
    with pytest.raises(ConfigError, match="call tune"):
        tuner.write_optimal_config()
    with pytest.raises(ConfigError, match=r"(?s)no config works:.*3 x "):
        tuner.tune()


# -- the search --------------------------------------------------------------------------------


def surface(
    stage: int, micro: int, recompute: str, bucket: float, tp: int, fails: bool
) -> float | None:
    """A throughput as they look: saturating in the batch, with costs that multiply."""
    if fails and micro * (4 - stage) * (1 if recompute == "all" else 3) > 96:
        return None
    speed = micro / (2.0 + micro)
    speed *= {0: 1.0, 1: 0.99, 2: 0.93, 3: 0.8}[stage] * (0.75 if recompute == "all" else 1.0)
    return 100 * speed / (1 + 0.05 * abs(math.log10(bucket) - 8)) / (1 + 0.1 * math.log2(tp))


@pytest.mark.parametrize("fails", [False, True])
def test_a_quarter_of_the_trials_come_within_5_percent(fails: bool) -> None:
    space = {
        "stage": [0, 1, 2, 3],
        "micro": [1, 2, 4, 8, 16],
        "recompute": ["none", "all"],
        "bucket": [5e7, 5e8, 1e9],
        "tp": [1, 2],
    }
    choices = choices_in(space)
    scores = {choice: surface(**dict(choice), fails=fails) for choice in choices}
    best = max(score for score in scores.values() if score)
    tried = search(
        choices, scores.__getitem__, how="model_based", most=len(choices) // 4, patience=20
    )
    assert max(score for score in tried.values() if score) >= 0.95 * best
    assert len(tried) <= len(choices) // 4


@pytest.mark.parametrize("wrong", [0.0, 0.1, 1.0])
def test_what_is_foretold_saves_trials_and_costs_none_where_it_is_wrong(wrong: float) -> None:
    space = {"stage": [0, 1, 2, 3], "micro": [1, 2, 4, 8, 16], "recompute": ["none", "all"]}
    choices = choices_in(space)
    scores = {c: surface(**dict(c), bucket=5e7, tp=1, fails=False) for c in choices}
    best = max(score for score in scores.values() if score)
    shaken = np.random.default_rng(1).normal(0.0, wrong, len(choices))
    plans = {
        c: 3e3 * (scores[c] or 0.0) * math.exp(z) for c, z in zip(choices, shaken, strict=True)
    }
    most = 6 if wrong < 1 else len(choices) // 2
    options: dict[str, Any] = {"how": "model_based", "most": most, "patience": 20}
    tried = search(choices, scores.__getitem__, foretold=plans, **options)
    assert max(score for score in tried.values() if score) >= 0.95 * best


@pytest.mark.parametrize("how", ["gridsearch", "random", "model_based"])
def test_a_search_ends_early(how: str) -> None:
    choices = choices_in({"a": list(range(30))})
    tried = search(choices, lambda _: 1.0, how=how, most=50, patience=4)
    assert len(tried) == 5 if how != "model_based" else len(tried) <= 5
    grid = search(choices, lambda _: 1.0, how="gridsearch", most=3, patience=9)
    assert list(grid) == choices[:3]


@pytest.mark.parametrize(("most", "chosen"), [(12, 2), (4, 1)])
def test_the_best_few_are_tried_again_where_trials_are_left(most: int, chosen: int) -> None:
    """One choice is lucky when it is tried first."""
    choices = choices_in({"a": [0, 1, 2, 3]})
    measured = {0: [50.0], 1: [109.0, 91.0], 2: [105.0, 105.0], 3: [60.0]}
    seen: dict[int, list[float]] = {value: [] for value in measured}

    def score(choice: Any) -> float:
        value = dict(choice)["a"]
        seen[value].append(measured[value][len(seen[value])])
        return sum(seen[value]) / len(seen[value])

    tried = search(choices, score, how="model_based", most=most, patience=20)
    assert dict(max(tried, key=lambda choice: tried[choice] or 0.0))["a"] == chosen
    assert sum(map(len, seen.values())) == (6 if most == 12 else 4)


def test_two_trials_of_one_config_are_one_result() -> None:
    trial = Trial("x", {}, seconds=1.0, throughput=8.0, peak=5)
    trial.add(Trial("x", {}, seconds=3.0, throughput=4.0, peak=7))
    assert (trial.seconds, trial.throughput, trial.peak, trial.runs) == (2.0, 6.0, 7, 2)
    trial.add(Trial("x", {}, error="out of memory"))
    assert (trial.seconds, trial.throughput, trial.error) == (2.0, 6.0, "")


def test_a_search_of_failures_tries_others() -> None:
    choices = choices_in({"a": [1, 2], "b": ["x", "y"]})
    tried = search(choices, lambda _: None, how="model_based", most=50, patience=9)
    assert len(tried) == len(choices) == len(list(itertools.product([1, 2], "xy")))


def test_global_batches_outside_of_the_limits_are_not_tried() -> None:
    section = AutotuningSection(min_train_batch_size=4, max_train_batch_size=8)
    choices = choices_in({"train_micro_batch_size_per_gpu": [1, 2, 4, 8]})
    left, reasons = possible({"gradient_accumulation_steps": 1}, choices, 2, section)
    assert [dict(choice)["train_micro_batch_size_per_gpu"] for choice in left] == [2, 4]
    assert "a global batch of 16 is not among 4 to 8" in reasons
    with pytest.raises(ValidationError, match="below min_train_batch_size"):
        AutotuningSection(min_train_batch_size=4, max_train_batch_size=2)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["train.py", "--batch", "1"], ["train.py", "--batch", "8"]),
        (["train.py", "--batch=1", "x"], ["train.py", "--batch=8", "x"]),
        (["train.py"], ["train.py", "--batch", "8"]),
    ],
)
def test_options_of_the_script_say_what_the_config_says(
    words: list[str], expected: list[str]
) -> None:
    config = {"train_micro_batch_size_per_gpu": 8}
    mappings = {"train_micro_batch_size_per_gpu": "--batch", "zero_optimization.stage": "--stage"}
    assert told(words, config, mappings) == expected
