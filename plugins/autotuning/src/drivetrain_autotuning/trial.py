"""One trial: a few steps of the script in processes of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from drivetrain_autotuning.section import PATH

_MEMORY = ("out of memory", "memoryerror", "can't allocate memory", "not enough memory")


def told(
    script: Sequence[str], config: Mapping[str, Any], mappings: Mapping[str, str] | None
) -> list[str]:
    """The words of ``script`` whose options say what ``config`` says.

    Args:
        script: file and arguments.
        config: of a trial.
        mappings: config path -> option; one that the script does not have is added.
    """
    words = list(script)
    for path, option in (mappings or {}).items():
        value: Any = config
        for key in path.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        if value is None:
            continue
        joined = [place for place, word in enumerate(words) if word.startswith(f"{option}=")]
        if joined:
            words[joined[0]] = f"{option}={value}"
        elif option in words[:-1]:
            words[words.index(option) + 1] = str(value)
        else:
            words += [option, str(value)]
    return words


@dataclass
class Trial:
    """What came of a choice.

    Args:
        name: of the choice.
        choice: config path -> value.
        seconds: of a step; ``None`` if there is none.
        throughput: samples a second.
        peak: bytes of rank 0's device.
        error: why there are none; empty if there are.
        runs: how often it was run; figures are means.
    """

    name: str
    choice: dict[str, Any]
    seconds: float | None = None
    throughput: float = 0.0
    peak: int = 0
    error: str = ""
    runs: int = 1

    def add(self, other: Trial) -> None:
        """Take in what another run of the same choice says; where it failed, nothing."""
        if other.seconds is not None and self.seconds is not None:
            self.seconds = (self.seconds + other.seconds) / 2
            self.throughput = (self.throughput + other.throughput) / 2
            self.peak = max(self.peak, other.peak)
        self.runs += 1

    def write(self, folder: Path) -> None:
        """Keep it for a later run."""
        (folder / f"{self.name}.json").write_text(json.dumps(asdict(self), indent=1), "utf-8")

    @classmethod
    def read(cls, folder: Path, name: str) -> Trial | None:
        """What an earlier run kept; ``None`` if nothing."""
        file = folder / f"{name}.json"
        try:
            return cls(**json.loads(file.read_text("utf-8")))
        except (OSError, ValueError, TypeError):
            return None


def run_trial(
    trial: Trial,
    config: Mapping[str, Any],
    script: Sequence[str],
    *,
    folder: Path,
    ranks: int,
    timeout: float,
) -> None:
    """Run it, and fill in what came of it.

    Args:
        trial: changed in place.
        config: of the trial.
        script: file and arguments, in which ``{config}`` stands for the config's file.
        folder: of this trial's files.
        ranks: processes.
        timeout: seconds after which it ends.
    """
    folder.mkdir(parents=True, exist_ok=True)
    times, file, logs = folder / "times.json", folder / "config.json", folder / "logs"
    times.unlink(missing_ok=True)
    section = {**config.get(PATH, {}), "enabled": True, "trial": str(times.absolute())}
    section.pop("space", None)
    file.write_text(json.dumps({**config, PATH: section}, indent=1), "utf-8")
    command = [sys.executable, "-m", "drivetrain.cli", "run", "--nproc", str(ranks)]
    command += ["--log-dir", str(logs)]
    command += [word.replace("{config}", str(file)) for word in script]
    with (folder / "output.log").open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code: int | None = process.wait(timeout)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
                try:
                    process.wait(30)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
    if times.exists():
        found = json.loads(times.read_text("utf-8"))
        trial.seconds, trial.throughput = found["seconds"], found["throughput"]
        trial.peak, trial.error = found["peak"], ""
    elif code is None:
        trial.error = f"no end after {timeout:g} s"
    elif code == 0:
        trial.error = "the script ended before the steps that count: give it more to do"
    else:
        trial.error = _why(folder, logs)


def _why(folder: Path, logs: Path) -> str:
    """The first rank's error, or the last lines that were printed."""
    for file in sorted(logs.rglob("rank*.error.json")):
        try:
            found = json.loads(file.read_text("utf-8"))
        except (OSError, ValueError):
            continue
        text = str(found.get("message", found))
        return "out of memory" if _is_memory(text) else text[:500]
    text = (folder / "output.log").read_text("utf-8", "replace").strip()
    if _is_memory(text):
        return "out of memory"
    return text.splitlines()[-1][:500] if text else "it ended without a word"


def _is_memory(text: str) -> bool:
    return any(word in text.lower() for word in _MEMORY)
