"""Tox plugin: one environment per distribution, with a shared torch and freshly built wheels.

Every distribution of the workspace gets an environment of its own name, in which only that
distribution and what it declares are installed, and beside it ``long-NAME``, the same for the tests
marked as long. ``tox.ini`` says the rest, with these keys:

- ``distributions``: workspace distributions to install (default: the environment's own);
- ``requirements``: what those declare from outside the workspace, for use in ``deps``;
- ``tests`` and ``processes``: folder of the tests, and how many processes share them;
- ``marks``: which tests of that folder: ``not long``, or ``long`` in a long environment.

The workspace part of an installation is built from the working tree in every run, so that no test
ever runs against a stale wheel; ``pip check`` then holds the result against what is declared.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from packaging.utils import canonicalize_name
from tox.config.loader.memory import MemoryLoader
from tox.execute.request import StdinSource
from tox.plugin import impl
from tox.tox_env.errors import Fail

from tools import torch_layer, workspace

if TYPE_CHECKING:
    from packaging.requirements import Requirement
    from tox.config.sets import ConfigSet, EnvConfigSet
    from tox.session.state import State
    from tox.tox_env.api import ToxEnv
    from tox.tox_env.installer import InstallArguments

WORKSPACE = workspace.load()
ENVIRONMENTS = {
    prefix + d.environment: d for d in WORKSPACE.values() for prefix in ("", workspace.LONG)
}


class Wheels:
    """Wheels of workspace distributions, each built at most once per tox run."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # environments of one run live in threads
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._built: dict[str, Path] = {}

    def get(self, distribution: workspace.Distribution) -> Path:
        """The wheel of ``distribution``, built from the working tree as it is in this run."""
        with self._lock:
            if distribution.name not in self._built:
                self._built[distribution.name] = self._build(distribution)
            return self._built[distribution.name]

    def _build(self, distribution: workspace.Distribution) -> Path:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="drivetrain-wheels-")
        target = Path(self._folder.name, distribution.name)
        # hatchling itself, not pip: an isolated build would download hatchling for every wheel
        command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(target)]
        done = subprocess.run(command, cwd=distribution.folder, capture_output=True, text=True)
        if done.returncode:
            raise Fail(f"cannot build {distribution.name}:\n{done.stdout}{done.stderr}")
        return next(target.glob("*.whl"))


WHEELS = Wheels()


@impl
def tox_extend_envs() -> Iterable[str]:
    """Declare an ordinary and a long environment per distribution."""
    return tuple(ENVIRONMENTS)


@impl
def tox_add_core_config(core_conf: ConfigSet, state: State) -> None:
    """Describe each of them."""
    for name, distribution in ENVIRONMENTS.items():
        folder = distribution.folder.relative_to(workspace.ROOT)
        tests = "the long tests of" if name.startswith(workspace.LONG) else "test"
        description = f"{tests} {distribution.name} ({folder}/) with nothing but what it declares"
        loader = MemoryLoader(description=description)
        state.conf.memory_seed_loaders[name].append(loader)


@impl
def tox_add_env_config(env_conf: EnvConfigSet, state: State) -> None:
    """Add the keys that this plugin knows."""
    own = ENVIRONMENTS.get(env_conf.name or "")
    env_conf.add_config(
        keys=["distributions"],
        of_type=list[str],
        default=[own.name] if own else [],
        desc="workspace distributions to install, or 'all'",
        post_process=lambda names: list(WORKSPACE) if names == ["all"] else names,
    )
    env_conf.add_config(
        keys=["tests"],
        of_type=str,
        default=str(own.folder / "tests") if own else "",
        desc="folder of the tests to run",
    )
    long = (env_conf.name or "").startswith(workspace.LONG)
    env_conf.add_config(
        keys=["marks"],
        of_type=str,
        default="long" if long else "not long",
        desc="which tests to run, as pytest's -m takes it",
    )
    env_conf.add_config(
        keys=["processes"],
        of_type=int,
        default=0,
        desc="how many processes share the tests; 0 runs them in one, without overhead",
    )
    env_conf.add_config(
        keys=["requirements"],
        of_type=str,
        default=lambda conf, name: "\n".join(str(r) for r in _requirements(env_conf)),
        desc="what the distributions declare from outside the workspace",
    )


@impl
def tox_on_install(
    tox_env: ToxEnv, arguments: InstallArguments, section: str, of_type: str
) -> None:
    """Show torch to pip before it installs anything."""
    if "torch" in {requirement.name for requirement in _requirements(tox_env.conf)}:
        try:
            layer = torch_layer.build(tox_env.core["work_dir"] / ".torch")
        except RuntimeError as error:
            raise Fail(str(error)) from error
        torch_layer.attach(layer, tox_env.conf["env_site_packages_dir"])


@impl
def tox_before_run_commands(tox_env: ToxEnv) -> None:
    """Install the workspace's part: fresh wheels of the distributions and what they need of it."""
    names = tox_env.conf["distributions"]
    if not names:
        return
    wanted = workspace.closure(names, WORKSPACE)
    wheels = [str(WHEELS.get(distribution)) for distribution in wanted]
    stale = _installed(tox_env.conf["env_site_packages_dir"]) & set(WORKSPACE)
    if stale:
        _pip(tox_env, "uninstall", "--yes", "--quiet", *sorted(stale))
    _pip(tox_env, "install", "--no-deps", "--no-index", "--quiet", *wheels)
    _pip(tox_env, "check")


def _requirements(env_conf: ConfigSet) -> list[Requirement]:
    """What one distribution's tests need is kept out of the environments with all of them."""
    own = env_conf.name in ENVIRONMENTS
    return workspace.external_requirements(env_conf["distributions"], WORKSPACE, tests=own)


def _installed(site_packages: Path) -> set[str]:
    folders = site_packages.glob("*.dist-info")
    return {str(canonicalize_name(folder.name.partition("-")[0])) for folder in folders}


def _pip(tox_env: ToxEnv, *arguments: str) -> None:
    command = ["python", "-I", "-m", "pip", *arguments]
    outcome = tox_env.execute(command, StdinSource.OFF, run_id=f"pip_{arguments[0]}", show=False)
    if outcome.exit_code:
        raise Fail(f"pip {arguments[0]} failed:\n{outcome.out}{outcome.err}")
