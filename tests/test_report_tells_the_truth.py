"""What ``drivetrain report`` says of each operator is what then runs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

import pytest

# Listens at every implementation and at every reference, prints the report, and calls each operator
# once in a job whose config says nothing; at last, who was called first for which operator.
LISTEN = """
import copy, dataclasses, json
import torch
from click.testing import CliRunner
from drivetrain.cli import main
from drivetrain.job.job import Job
from drivetrain.plan.plan import Plan
from drivetrain_kernels.registry import registry

called = {}

def listening(function, op, who):
    def listener(*arguments):
        called.setdefault(op, who)  # a kernel may leave a part to the reference, later
        return function(*arguments)
    return listener

for op in registry.ops():
    object.__setattr__(op, "reference", listening(op.reference, op.name, "reference"))
for provider in registry.providers("cpu"):
    for op, offer in provider.offers.items():
        def bind(library, op=op, who=str(provider), bind=offer.bind):
            return listening(bind(library), op, who)
        provider.offers[op] = dataclasses.replace(offer, bind=bind)

report = CliRunner().invoke(main, ["report"])
assert report.exit_code == 0, report.output
print(report.output)
with Job.open(Plan.build({}, batch_required=False)):
    for op in registry.ops():
        example = next(e for e in op.examples(torch.device("cpu")) if e.arguments[0] is not None)
        op.call(*copy.deepcopy(example.arguments))
print("called:", json.dumps(called))
"""

Run = Callable[..., str]


def said_and_called(output: str) -> tuple[dict[str, str], dict[str, str]]:
    """Op -> implementation: as the report says, and as was seen."""
    report, _, seen = output.rpartition("called: ")
    table = report.partition("\nkernels")[2].partition("└")[0]
    said = {}
    for who, ops in re.findall(r"│ kernels for cpu: (.+?) +│ ([a-z_0-9, ]+) \(", table):
        said |= dict.fromkeys(ops.split(", "), who)
    return said, json.loads(seen)


def test_the_kernels_of_the_cpu_are_reported_where_they_run(with_lantern: Run) -> None:
    said, called = said_and_called(with_lantern("-c", LISTEN))
    assert said == called
    assert set(said.values()) == {"drivetrain-cpu 0.1.0"}


def test_those_of_the_accelerator_that_is_chosen_are_reported_where_they_run(
    with_lantern: Run,
) -> None:
    output = with_lantern("-c", LISTEN, DRIVETRAIN_ACCELERATOR="lantern")
    said, called = said_and_called(output)
    assert said == called
    assert {op for op, who in said.items() if who == "lantern-drivetrain 0.1.0"} == {"lion"}
    assert "the active accelerator's, " in output


def test_references_are_reported_where_no_package_has_kernels(with_lantern: Run) -> None:
    output = with_lantern("-c", LISTEN, DRIVETRAIN_DISABLE_PLUGINS="drivetrain-cpu")
    said, called = said_and_called(output)
    assert said == called
    assert set(said.values()) == {"reference"}
    assert "no installed package implements it for cpu" in output


@pytest.fixture
def no_compiler(tmp_path) -> dict[str, str]:
    """Neither a compiler nor a binary that was built earlier."""
    return {"CXX": str(tmp_path / "none"), "DRIVETRAIN_CACHE": str(tmp_path / "cache")}


def test_references_are_reported_where_there_is_no_compiler(with_lantern: Run, no_compiler) -> None:
    output = with_lantern("-c", LISTEN, **no_compiler)
    said, called = said_and_called(output)
    assert said == called
    assert set(said.values()) == {"reference"}
    assert "drivetrain-cpu 0.1.0 cannot be built: " in output
