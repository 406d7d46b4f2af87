"""The conformance kit fails implementations that are broken on purpose, each by the right check."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from xml.etree import ElementTree as ET

import pytest

PRELUDE = """
import torch
from drivetrain.testing.kernels import KernelConformance
from drivetrain_kernels import Example, Op, Refusal
from drivetrain_kernels.checks import Checker

SIGNATURE = "(Tensor(a!) target, Tensor source, float factor) -> ()"

def reference(target, source, factor):
    target.copy_(source * factor)

def check(target, source, factor):
    Checker("scaled").numel(source, "source", target.numel(), "as many as target")

def examples(device):
    for size in (0, 3, 33):
        values = torch.linspace(-1, 1, size + 1, device=device)[1:]
        yield Example(f"{size}", (torch.zeros(size, device=device), values, 0.5))

def refusals(device):
    yield Refusal("short", (torch.zeros(3), torch.zeros(2), 1.0), "source")

def healthy(target, source, factor):
    check(target, source, factor)
    reference(target, source, factor)
    torch.autograd.graph.increment_version(target)

calls = []
declared = Op("scaled", SIGNATURE, reference, check, examples, refusals)
libraries = []

def tested(case, implementation, fake=lambda target, source, factor: None, by="acme 1.0"):
    library = torch.library.Library(f"kit_{case}", "FRAGMENT")
    libraries.append(library)
    library.define("scaled" + SIGNATURE)
    library.impl("scaled", implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"kit_{case}::scaled", fake)

    class Tested:
        name, mutated, tolerance = declared.name, declared.mutated, declared.tolerance
        call = getattr(torch.ops, f"kit_{case}").scaled.default
        reference = staticmethod(declared.reference)
        examples, refusals = staticmethod(examples), staticmethod(refusals)

        def provider(self, device_type):
            return by

    return (Tested(),)

def wrong(target, source, factor):
    healthy(target, source, factor)
    if target.numel() > 30:
        target[-1] += 1e-3

def flickering(target, source, factor):
    healthy(target, source, factor)
    calls.append(1)
    target.mul_(1 + 1e-6 * (len(calls) % 2))

def greedy(target, source, factor):
    healthy(target, source, factor)
    source.zero_()

def silent(target, source, factor):
    check(target, source, factor)
    target.numpy()[:] = (source * factor).numpy()

def lax(target, source, factor):
    if target.numel() == source.numel():
        healthy(target, source, factor)

def lying_fake(target, source, factor):
    return torch.empty_like(target)

class Acme(KernelConformance):
    provider = "acme"
"""
CASES = {
    "Healthy": ("tested('healthy', healthy)", {}),
    "Wrong": ("tested('wrong', wrong)", {}),
    "Flickering": ("tested('flickering', flickering)", {}),
    "Greedy": ("tested('greedy', greedy)", {}),
    "Silent": ("tested('silent', silent)", {}),
    "Lax": ("tested('lax', lax)", {}),
    "Lying": ("tested('lying', healthy, fake=lying_fake)", {}),
    "Fallback": ("tested('fallback', healthy, by='reference')", {}),
    "Excused": ("tested('excused', lax)", {"scaled::test_refuses_bad_arguments": "no checks"}),
    "Strict": ("tested('strict', healthy)", {"scaled::test_repeats_itself": "not any more"}),
    "Slip": ("tested('slip', healthy)", {"scaled::test_nothing": "a slip"}),
}


@pytest.fixture(scope="module")
def failures(tmp_path_factory):
    """Case -> the checks that failed; one pytest run in a process of its own."""
    folder = tmp_path_factory.mktemp("kit")
    text = PRELUDE
    for case, (ops, expected) in CASES.items():
        text += textwrap.dedent(f"""
            class Test{case}(Acme):
                ops = {ops}
                expected_failures = {expected!r}
        """)
    (folder / "test_acme.py").write_text(text)
    report = folder / "report.xml"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        f"--junitxml={report}",
    ]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert run.returncode in (0, 1), run.stdout + run.stderr
    found = {case: set() for case in CASES}
    for test in ET.parse(report).iter("testcase"):
        case = test.get("classname").rpartition("Test")[2]
        if test.find("failure") is not None:
            found[case].add(test.get("name").partition("[")[0])
    return found


@pytest.mark.parametrize(
    ("case", "check"),
    [
        ("Wrong", "test_matches_the_float64_reference"),
        ("Flickering", "test_repeats_itself"),
        ("Greedy", "test_leaves_inputs_alone"),
        ("Silent", "test_bumps_versions"),
        ("Lax", "test_refuses_bad_arguments"),
        ("Lying", "test_passes_opcheck"),
        ("Fallback", "test_is_in_use"),
        ("Strict", "test_repeats_itself"),
        ("Slip", "test_expected_failures_name_checks"),
    ],
)
def test_a_fault_is_caught_by_the_check_made_for_it(failures, case, check):
    assert check in failures[case]


def test_what_is_sound_passes_every_check(failures):
    assert failures["Healthy"] == set()
    assert failures["Excused"] == set()


def test_a_fault_in_one_place_fails_no_unrelated_check(failures):
    assert failures["Lax"] == {"test_refuses_bad_arguments"}
    assert failures["Fallback"] == {"test_is_in_use"}
    assert failures["Silent"] == {"test_bumps_versions"}
