"""Run mypy over the sources of every distribution, as one program."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools import workspace


def main() -> int:
    """Check all ``src`` folders and the tools; answers mypy's exit status."""
    sources = [str(d.folder / "src") for d in workspace.load().values()]
    packages = [
        str(path) for source in sources for path in sorted(Path(source).glob("*/__init__.py"))
    ]
    targets = [str(Path(package).parent) for package in packages]
    targets += [str(workspace.ROOT / "tools"), str(workspace.ROOT / "toxfile.py")]
    environment = {**os.environ, "MYPYPATH": os.pathsep.join([*sources, str(workspace.ROOT)])}
    command = [sys.executable, "-m", "mypy", *targets]
    return subprocess.run(command, cwd=workspace.ROOT, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
