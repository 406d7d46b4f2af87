"""Which environment variables go with a job to its hosts."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from drivetrain.errors import DrivetrainError

PREFIXES = (
    *("NCCL", "GLOO", "UCX", "FI_", "OMP_", "KMP_", "MV2", "RCCL", "CCL_"),
    *("PYTHON", "TORCH", "DRIVETRAIN_", "HF_", "WANDB_", "MLFLOW", "COMET_"),
)
"""Variables whose names begin so are what decides how a job runs."""

_SECRET = ("_KEY", "_TOKEN", "_SECRET", "_PASSWORD")

FILE = ".deepspeed_env"
"""Its lines ``NAME=value`` are exported, too; in the home folder and in the working directory."""

FILE_VARIABLE = "DS_ENV_FILE"
"""Names another file."""


def exported(
    environment: Mapping[str, str], names: Iterable[str], folder: Path, home: Path
) -> dict[str, str]:
    """Variables that a job's hosts get.

    Args:
        environment: of the launching process.
        names: what the user wants besides, as ``NAME`` or ``NAME=value``.
        folder: the working directory: goes first into ``PYTHONPATH``, since scripts import from it.
        home: the home folder.

    Raises:
        DrivetrainError: a wanted variable is not set, or a line of a file is wrong.
    """
    chosen = {name: value for name, value in environment.items() if name.startswith(PREFIXES)}
    for place in dict.fromkeys((home, folder)):
        chosen |= read_file(place / environment.get(FILE_VARIABLE, FILE))
    for wanted in names:
        name, equals, value = wanted.partition("=")
        if not equals and name not in environment:
            raise DrivetrainError(f"--export {name}: the variable is not set")
        chosen[name] = value if equals else environment[name]
    paths = [str(folder), *filter(None, chosen.get("PYTHONPATH", "").split(os.pathsep))]
    return {**chosen, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}


def read_file(path: Path) -> dict[str, str]:
    """The ``NAME=value`` lines of a file; none if there is no such file.

    Raises:
        DrivetrainError: a line has no name or no ``=``.
    """
    if not path.is_file():
        return {}
    found = {}
    for number, text in enumerate(path.read_text("utf-8").splitlines(), 1):
        line = text.strip()
        if not line or line.startswith("#"):
            continue
        name, equals, value = line.removeprefix("export ").partition("=")
        if not equals or not name.strip().isidentifier():
            raise DrivetrainError(f"{path}:{number}: {line!r} is not of the form NAME=value")
        found[name.strip()] = value.strip()
    return found


def without_secrets(variables: Mapping[str, str], wanted: Iterable[str]) -> dict[str, str]:
    """Those that may stand on a command line, which every user of a host can read.

    Args:
        variables: all.
        wanted: names that the user has asked for one by one; they stay.
    """
    named = {text.partition("=")[0] for text in wanted}
    return {
        name: value
        for name, value in variables.items()
        if name in named or not name.endswith(_SECRET)
    }
