"""One rank of ``deepspeed SCRIPT ...``: runs the script, with the argument that DeepSpeed adds."""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path


def main(arguments: list[str]) -> None:
    """Run a script or a module as the main program.

    Args:
        arguments: ``script`` or ``module``; 1 to pass ``--local_rank=N``; its name; its arguments.
    """
    kind, passes_rank, name, *rest = arguments
    local_rank = [f"--local_rank={os.environ.get('LOCAL_RANK', '0')}"] if passes_rank == "1" else []
    sys.argv = [name, *local_rank, *rest]
    if kind == "module":
        sys.path.insert(0, str(Path.cwd()))
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(Path(name).resolve().parent))
        runpy.run_path(name, run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
