"""``examples/compress/train_quantised.py``: trained in few bits, beside rounded afterwards."""

from __future__ import annotations

import re
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[3] / "examples" / "compress" / "train_quantised.py"

pytestmark = pytest.mark.skipif(
    find_spec("sklearn") is None or not EXAMPLE.exists(), reason="needs scikit-learn and examples/"
)


def shares(monkeypatch, capsys, epochs):
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), "--bits", "1", "--epochs", str(epochs)])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    return [float(share) for share in re.findall(r"([0-9.]+)%", capsys.readouterr().out)]


def test_the_example_tells_three_networks(monkeypatch, capsys):
    assert len(shares(monkeypatch, capsys, 1)) == 3


@pytest.mark.long
def test_training_in_one_bit_is_better_than_rounding_afterwards(monkeypatch, capsys):
    exact, rounded, aware = shares(monkeypatch, capsys, 10)
    assert exact > aware > rounded + 2
