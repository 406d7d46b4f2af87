"""Servers that go on when the script that started them has ended, found again by name."""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drivetrain.errors import ConfigError, DrivetrainError
from mii.options import read

if TYPE_CHECKING:
    from mii.asking import MIIClient

_LOOK_SECONDS = 0.1
_END_SECONDS = 150.0
"""How long a server may take to finish what runs; then it is killed."""

_NAME = re.compile(r"[\w.-]+")


class DeploymentError(DrivetrainError, RuntimeError):
    """A deployment that is not there, or did not start."""


@dataclass(frozen=True)
class Deployment:
    """A server, as its file says.

    Args:
        name: of the deployment, and of the model in the protocol.
        model: folder or file.
        url: where it listens.
        key: that requests must bring.
        process: number of the server's process.
        born: when that began, as the system counts; 0 where it does not tell.
    """

    name: str
    model: str
    url: str
    key: str
    process: int
    born: int

    def ask(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """An open answer to a request: POST where there is a body.

        Raises:
            ConfigError: the server refuses the request; its message.
            DeploymentError: it does not answer.
        """
        request = urllib.request.Request(  # noqa: S310 - the address is that of the file
            f"{self.url}{path}",
            None if body is None else json.dumps(body).encode(),
            {"authorization": f"Bearer {self.key}", "content-type": "application/json"},
        )
        try:
            return urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request)
        except urllib.error.HTTPError as error:
            with error:
                said = error.read().decode(errors="replace")
            with suppress(ValueError, KeyError, TypeError):
                said = json.loads(said)["error"]["message"]
            kind = ConfigError if error.code < 500 else DeploymentError
            raise kind(f"{self.name}: {said}") from None
        except OSError as error:
            raise DeploymentError(f"{self.name} does not answer at {self.url}: {error}") from None

    def lives(self) -> bool:
        """Whether its process is still there."""
        try:
            os.kill(self.process, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return False  # somebody else's, who has the number now
        return _born(self.process) == self.born

    def end(self) -> None:
        """Let it finish what runs, and forget it."""
        if self.lives():
            os.kill(self.process, signal.SIGTERM)
            deadline = time.monotonic() + _END_SECONDS
            while self.lives() and time.monotonic() < deadline:
                with suppress(ChildProcessError):
                    os.waitpid(self.process, os.WNOHANG)
                time.sleep(_LOOK_SECONDS)
            if self.lives():
                os.kill(self.process, signal.SIGKILL)
        _file(self.name).unlink(missing_ok=True)


def find(name: str) -> Deployment:
    """The deployment of a name, or of the model with that name.

    Raises:
        DeploymentError: there is none, or its process has ended.
    """
    for known in (name, f"{Path(name).name}-mii-deployment"):
        if not _NAME.fullmatch(known) or not _file(known).is_file():
            continue
        found = Deployment(**json.loads(_file(known).read_text("utf-8")))
        if found.lives():
            return found
        raise DeploymentError(
            f"the deployment {known} has ended; see {_file(known).with_suffix('.log')}, and start "
            "it again with mii.serve"
        )
    there = ", ".join(sorted(file.stem for file in _folder().glob("*.json"))) or "none"
    raise DeploymentError(f"there is no deployment {name!r} on this host; there are: {there}")


def serve(
    model_name_or_path: str = "",
    model_config: Mapping[str, Any] | None = None,
    mii_config: Mapping[str, Any] | None = None,
    **options: Any,
) -> MIIClient:
    """Start a server that stays until ``terminate_server()``; returns a client of it.

    It is ``drivetrain serve``: it listens on this machine alone and asks for a key that only this
    user's file has. Its page and the protocol of OpenAI are at ``client.deployment.url``.

    Args:
        model_name_or_path: a folder that ``save_pretrained`` has written, or a GGUF file.
        model_config: options of MII's ``ModelConfig``, as a dict.
        mii_config: options of ``MIIConfig``, as a dict.
        **options: of both.

    Raises:
        UnknownArgument: there is no such option.
        ConfigError: one of them is not served.
        DeploymentError: there is a deployment of that name, or the server did not start.
    """
    from mii.asking import MIIClient

    asked = read(str(model_name_or_path), model_config, mii_config, **options)
    if asked.ranks > 1:
        raise ConfigError(
            "mii.serve: a model that ranks share is not served yet; use mii.pipeline with "
            "tensor_parallel, or replica_num"
        )
    if not _NAME.fullmatch(asked.name):
        raise ConfigError(
            f"mii.serve: deployment_name {asked.name!r} may have letters, digits, dots, - and _"
        )
    with suppress(DeploymentError):
        there = find(asked.name)
        raise ConfigError(
            f"the deployment {there.name} is there already (process {there.process}); use "
            f"mii.client({there.name!r}), or end it first"
        )
    host = "127.0.0.1" if asked.rest_host == "localhost" else asked.rest_host
    options_of_serve = ["--replicas", str(asked.replicas), "--port", str(asked.rest_port)]
    deployment = _start(asked.name, asked.model, asked.section, [*options_of_serve, "--host", host])
    return MIIClient(deployment)


def _start(name: str, model: str, section: Mapping[str, Any], options: list[str]) -> Deployment:
    """A server of its own session, once it listens."""
    file, key = _file(name), secrets.token_urlsafe(24)
    with tempfile.TemporaryDirectory() as folder, file.with_suffix(".log").open("w+") as log:
        config = Path(folder) / "config.json"
        config.write_text(json.dumps({"inference": dict(section)}))
        command = [sys.executable, "-m", "drivetrain.cli", "serve", model, "--name", name]
        process = subprocess.Popen(
            [*command, "--config", str(config), *options],
            env={**os.environ, "DRIVETRAIN_API_KEYS": key},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            while True:
                said = file.with_suffix(".log").read_text("utf-8", errors="replace")
                served = re.search(r"is served at (\S+)", said)
                if served:
                    break
                if process.poll() is not None:
                    lines = said.strip().splitlines()
                    raise DeploymentError(
                        f"the server of {name} ended with status {process.returncode}: "
                        + " | ".join(lines[-3:])
                    )
                time.sleep(_LOOK_SECONDS)
        except BaseException:  # nobody knows of it yet, so nobody could end it
            process.terminate()
            raise
    born = _born(process.pid)
    found = Deployment(name, model, served[1], key, process.pid, born)
    whole = file.with_suffix(".new")
    whole.touch(mode=0o600)
    whole.write_text(json.dumps(asdict(found)))
    whole.replace(file)
    process.returncode = 0  # it stays when this script ends
    return found


def _folder() -> Path:
    base = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    folder = Path(base) / "drivetrain" / "mii"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def _file(name: str) -> Path:
    return _folder() / f"{name}.json"


def _born(process: int) -> int:
    """When a process began, in the system's ticks; 0 where that is not told."""
    try:
        text = Path(f"/proc/{process}/stat").read_text("utf-8")
    except OSError:
        return 0
    fields = text.rpartition(")")[2].split()
    return 0 if fields[0] == "Z" else int(fields[19])
