"""Two hosts, of which one is cut off from the network: the other goes on from memory.

Hosts are network namespaces of this machine, joined by a pair of virtual network cards.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import drivetrain
from drivetrain.testing import data, models, run_distributed

SCRIPT = Path(__file__).parent / "surviving_script.py"
FIRST, SECOND = "10.213.7.1", "10.213.7.2"
NAMES = [f"drivetrain-{os.getpid()}-{number}" for number in (1, 2)]

CONFIG: dict[str, Any] = {
    "train_batch_size": 8,
    "train_micro_batch_size_per_gpu": 1,
    "exact": {},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
    "zero_optimization": {"stage": 2},
    "survival": {"every": 2},
    "communication": {"watchdog": {"patience_seconds": 15}},
}
STEPS = 12


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture
def hosts() -> Iterator[None]:
    """Two namespaces that reach each other."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces take the program ip, and root")
    if subprocess.run(["ip", "netns", "add", NAMES[0]], capture_output=True).returncode:
        pytest.skip("no network namespaces here")
    try:
        ip("netns", "add", NAMES[1])
        cards = [f"dt{os.getpid() % 100_000}{letter}" for letter in "ab"]
        ip("link", "add", cards[0], "type", "veth", "peer", "name", cards[1])
        for name, card, address in zip(NAMES, cards, (FIRST, SECOND), strict=True):
            ip("link", "set", card, "netns", name, "name", "eth0")
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
            for each in ("lo", "eth0"):
                ip("-n", name, "link", "set", each, "up")
        yield
    finally:
        for name in NAMES:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def start(folder: Path, host: int, weights: Path) -> subprocess.Popen[str]:
    order = {
        "config": CONFIG,
        "steps": STEPS,
        "kills": [],
        "weights": str(weights),
        "waits": [0, 5, str(folder / "cut")],
        "marks": str(folder),
    }
    command = [
        *("ip", "netns", "exec", NAMES[host], sys.executable, "-m", "drivetrain.cli", "run"),
        *("--nproc", "2", "--nnodes", "1:2", "--max-restarts", "2", "--grace", "5"),
        *("--rdzv-endpoint", f"{FIRST}:29433", "--log-dir", str(folder / f"logs{host}")),
        *(str(SCRIPT), json.dumps(order)),
    ]
    return subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def trained() -> dict[str, torch.Tensor]:
    """Weights of a run in which nothing happens."""
    samples = list(zip(*data.tokens(64), strict=True))
    config = {**CONFIG, "survival": {"enabled": False}}
    engine = drivetrain.initialize(model=models.tiny_gpt(), config=config, training_data=samples)[0]
    for _ in range(STEPS):
        engine.train_batch()
    weights = engine.module_state_dict()
    engine.destroy()
    engine.job.close()
    return weights


@pytest.mark.long
def test_a_host_that_is_cut_off_costs_no_read_from_disk(hosts: None, tmp_path: Path) -> None:
    weights = tmp_path / "weights.pt"
    processes = [start(tmp_path, host, weights) for host in (0, 1)]
    try:
        marks = [tmp_path / f"waits-{rank}" for rank in range(4)]
        while not all(mark.exists() for mark in marks):
            assert processes[0].poll() is None, processes[0].communicate()[0]
            time.sleep(0.05)
        ip("-n", NAMES[1], "link", "set", "eth0", "down")
        (tmp_path / "cut").touch()  # and now its ranks go on
        output = processes[0].communicate(timeout=400)[0]
        assert processes[0].returncode == 0, output
        assert "start 1: from keeper://survival/copy at step 4" in output
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.communicate(timeout=100)
    expected = run_distributed(trained, 2)[0]
    found = torch.load(weights)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
