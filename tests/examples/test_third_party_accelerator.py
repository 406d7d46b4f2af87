"""The example of an accelerator by somebody else: installed with pip, chosen, tested, reported."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

# Trains with Lion for a few steps in three jobs, and tells whose Lion ran in each, and outside.
TRAIN = """
import json, sys
import torch
import drivetrain
from drivetrain_kernels import implementations

def used():
    (found,) = [f for f in implementations(["cpu"]) if f.op == "lion"]
    return f"{found.provider}: {found.reason}"

def train(accelerator):
    torch.manual_seed(0)
    engine, *_ = drivetrain.initialize(
        model=torch.nn.Linear(4, 1),
        config={
            "train_batch_size": 8,
            "accelerator": accelerator,
            "optimizer": {"type": "FusedLion", "params": {"lr": 0.01, "betas": [0.9, 0.99]}},
        },
    )
    for step in range(5):
        inputs = torch.full((8, 4), float(step), device=engine.device)
        loss = (engine(inputs) - 1).square().mean()
        engine.backward(loss)
        engine.step()
    answer = {
        "class": type(engine.job.accelerator).__name__,
        "lion": used(),
        "weights": next(engine.module.parameters()).tolist(),
    }
    engine.destroy()
    return answer

answers = {"before": used()}
for accelerator in sys.argv[1:]:
    answers[accelerator] = train(accelerator)
answers["after"] = used()
print(json.dumps(answers))
"""

Run = Callable[..., str]


def test_a_job_that_names_it_runs_its_kernel_and_others_do_not(with_lantern: Run) -> None:
    answers = json.loads(with_lantern("-c", TRAIN, "cpu", "lantern", "auto"))
    lantern, cpu = answers["lantern"], answers["cpu"]
    assert lantern["class"] == "Lantern"
    assert lantern["lion"].startswith("lantern-drivetrain 0.1.0: the active accelerator's, ")
    for other in (cpu, answers["auto"]):
        assert other["class"] != "Lantern"
        assert other["lion"].startswith("drivetrain-cpu 0.1.0: ")
    for outside in ("before", "after"):
        assert answers[outside].startswith("drivetrain-cpu 0.1.0: the device's own, ")
    assert lantern["weights"][0] == pytest.approx(cpu["weights"][0], rel=1e-6)


def test_the_environment_chooses_it_too(with_lantern: Run) -> None:
    answers = json.loads(with_lantern("-c", TRAIN, "auto", DRIVETRAIN_ACCELERATOR="lantern"))
    assert answers["auto"]["class"] == "Lantern"
    assert answers["auto"]["lion"].startswith("lantern-drivetrain 0.1.0")


def test_without_the_packages_of_the_cpu_it_stands_beside_the_reference(with_lantern: Run) -> None:
    hidden = {"DRIVETRAIN_DISABLE_PLUGINS": "drivetrain-cpu"}
    answers = json.loads(with_lantern("-c", TRAIN, "lantern", "cpu", **hidden))
    assert answers["lantern"]["lion"].startswith("lantern-drivetrain 0.1.0")
    assert answers["cpu"]["class"] == "HostAccelerator"
    assert answers["cpu"]["lion"] == "reference: no installed package implements it for cpu"


def test_its_own_tests_pass_which_are_the_kits(with_lantern: Run, root: Path) -> None:
    tests = str(root / "examples" / "third_party_accelerator" / "tests")
    shown = with_lantern("-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", tests, tests)
    assert " passed" in shown
    assert "skipped" not in shown


@pytest.mark.long
def test_the_kit_runs_from_the_shell(with_lantern: Run) -> None:
    shown = with_lantern("-m", "drivetrain.cli", "test-plugin", "lantern")
    assert "accelerator 'lantern' (lantern-drivetrain 0.1.0)" in shown
    assert shown.count("│ passed ") == len([line for line in shown.splitlines() if "│" in line])


def kernels_of_lion(report: str) -> str:
    """The row of the table of kernels that names Lion."""
    table = report.partition("\nkernels")[2].partition("└")[0]
    (row,) = [line for line in table.splitlines() if "lion" in line]
    return row


def test_the_report_names_its_kernel_while_it_is_chosen(with_lantern: Run) -> None:
    report = ("-m", "drivetrain.cli", "report")
    plain, chosen = with_lantern(*report), with_lantern(*report, DRIVETRAIN_ACCELERATOR="lantern")
    assert "│ lantern (lantern-drivetrain 0.1.0) │ usable" in plain
    assert "lantern-drivetrain" not in kernels_of_lion(plain)
    assert "lantern-drivetrain 0.1.0" in kernels_of_lion(chosen)
    assert "adam" not in kernels_of_lion(chosen)
