"""Without Triton its kernels say so, and the references run."""

from __future__ import annotations

import sys

import pytest
import torch
from drivetrain_kernels import Provider, lion, registry
from drivetrain_kernels.triton_kernels import OPS, triton_kernel
from in_place import in_place

from drivetrain.errors import BuildError


@pytest.fixture(autouse=True)
def no_triton(monkeypatch):
    loaded = [name for name in sys.modules if name.startswith("drivetrain_kernels.triton_kernels.")]
    for name in loaded:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)


def test_a_kernel_cannot_be_made_and_says_what_to_install():
    with pytest.raises(
        BuildError, match=r"triton cannot be imported .*; install the one that this"
    ):
        triton_kernel("adam")()


def test_what_is_not_written_in_triton_is_known_without_it():
    assert triton_kernel("flatten") is None
    assert all(triton_kernel(op) is not None for op in OPS)


def test_the_reference_runs_and_the_report_says_why(monkeypatch):
    provider = Provider("acme", "1.0", "cpu")
    provider.implement_later("lion", triton_kernel("lion"))
    with in_place(provider):
        monkeypatch.delenv("DRIVETRAIN_REQUIRE_NATIVE")
        weights = torch.ones(3)
        lion(weights, torch.ones(3), torch.zeros(3), lr=0.5)
        assert weights.tolist() == [0.5] * 3
        found = registry.implementation("lion", "cpu")
    assert found.provider == "reference"
    assert "triton cannot be imported" in found.reason
