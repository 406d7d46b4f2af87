"""Core works in one process where the modules and functions of POSIX are missing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from drivetrain.plan.registry import Registry

PROGRAM = Path(__file__).with_name("without_posix.py")


def test_one_process_trains_and_saves_without_posix(tmp_path: Path) -> None:
    others = {entry.distribution for entry in Registry.installed().entries("accelerators")}
    done = subprocess.run(
        [sys.executable, str(PROGRAM), str(tmp_path / "saved")],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        # Packages for other devices, and their kernels, may need what is missing.
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "DRIVETRAIN_DISABLE_PLUGINS": ",".join({*others, "drivetrain-kernels"}),
        },
    )
    assert done.returncode == 0, done.stderr[-3_000:]
    assert (tmp_path / "saved" / "latest").is_file()
