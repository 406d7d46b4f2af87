"""What a rank of ``run_distributed`` does: run functions that come over a connection."""

from __future__ import annotations

import gc
import importlib
import importlib.util
import os
import pickle
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

from drivetrain.job.job import open_jobs


@dataclass(frozen=True)
class Call:
    """A function to run.

    Args:
        module: name of the module that defines it.
        file: that module's file, for modules that cannot be imported by their name.
        name: the function's qualified name.
        arguments: what to call it with, pickled: what it refers to may need the caller's path.
        path: the caller's ``sys.path``.
        environment: all variables of the process while the call runs.
    """

    module: str
    file: str
    name: str
    arguments: bytes
    path: list[str]
    environment: Mapping[str, str]


@dataclass(frozen=True)
class Outcome:
    """What became of a call.

    Args:
        result: what the function returned, pickled; ``None`` when it raised.
        error: type and message of what it raised.
        stack: the traceback, as text.
        at: when it ended, on the host's monotonic clock.
    """

    result: bytes | None = None
    error: str = ""
    stack: str = ""
    at: float = 0.0


def serve(control: int) -> None:
    """Run calls from the connection with descriptor ``control`` until it closes or one raises."""
    connection = Connection(control)
    torch.set_num_threads(1)
    while True:
        try:
            call: Call = pickle.loads(connection.recv_bytes())  # noqa: S301 - both ends are ours
        except EOFError:
            return
        with _clean_process(call):
            outcome = _run(call)
        sys.stdout.flush()
        sys.stderr.flush()
        connection.send_bytes(pickle.dumps(outcome))
        if outcome.result is None:
            return


def _run(call: Call) -> Outcome:
    try:
        function = _find(call)
        result = function(*pickle.loads(call.arguments))  # noqa: S301
        return Outcome(result=pickle.dumps(result), at=time.monotonic())
    except BaseException as error:  # noqa: BLE001 - a rank reports whatever ended it
        at = time.monotonic()
        kind, stack = type(error), traceback.format_exc()
        # An open job tells the other ranks from its hook, as it would in a script.
        sys.excepthook(kind, error, error.__traceback__)
        return Outcome(error=f"{kind.__name__}: {error}", stack=stack, at=at)


def _find(call: Call) -> Callable[..., Any]:
    found: Any = _module(call.module, call.file)
    for part in call.name.split("."):
        found = getattr(found, part)
    function: Callable[..., Any] = found
    return function


def _module(name: str, file: str) -> ModuleType:
    loaded = sys.modules.get(name)
    if loaded is None and importlib.util.find_spec(name) is not None:
        loaded = importlib.import_module(name)
    if loaded is not None and _file(loaded) == Path(file):
        return loaded
    # A script, a module that pytest imported by its path, or one of several of the same name.
    # Under its own name a script's ``if __name__ == "__main__"`` would hold: ranks start ranks.
    spec = importlib.util.spec_from_file_location(
        "__mp_main__" if name == "__main__" else name, file
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _file(module: ModuleType) -> Path | None:
    file = getattr(module, "__file__", None)
    return Path(file) if file else None


@contextmanager
def _clean_process(call: Call) -> Iterator[None]:
    """Set up what a call needs, and undo what it leaves behind, since ranks are used again."""
    environment, hook, directory = dict(os.environ), sys.excepthook, Path.cwd()
    affinity = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    sys.path[:] = call.path
    os.environ.clear()
    os.environ.update(call.environment)
    sys.excepthook = lambda *_: None  # errors go back to the caller, who shows them
    torch.manual_seed(0)
    try:
        yield
    finally:
        for job in open_jobs():  # or errors of the next call's job would go to nobody
            job.close()
        gc.collect()
        gc.freeze()  # what is left are modules, which the next collection need not walk
        if dist.is_initialized():
            dist.destroy_process_group()
        if affinity is not None:
            os.sched_setaffinity(0, affinity)
        os.chdir(directory)
        os.environ.clear()
        os.environ.update(environment)
        sys.excepthook = hook
        torch.set_default_dtype(torch.float32)
        if torch.are_deterministic_algorithms_enabled():  # setting it loads torch's compiler
            torch.use_deterministic_algorithms(False)
        torch.set_num_threads(1)
