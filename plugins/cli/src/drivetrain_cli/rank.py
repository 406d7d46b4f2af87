"""What every rank of ``drivetrain run`` executes: the user's script, its output and failure kept.

Ranks other than the first of a machine write their output to a file; the first one's is shown live
and recorded by the launcher. An exception is also written down with its time, so that the launcher
can tell the cause from what it brought about on other ranks.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from types import TracebackType

from drivetrain.errors import CommunicationError, DrivetrainError
from drivetrain_cli.cores import VARIABLE as CORES
from drivetrain_cli.cores import bind

FOLDER_VARIABLE = "DRIVETRAIN_RUN_FOLDER"

FIRST_LOG = "first-rank.log"
"""Where the launcher keeps the first rank's output until that rank has a number."""


def main() -> None:
    """Run ``sys.argv[2]``, a script or (``sys.argv[1] == "module"``) a module, as ``__main__``."""
    kind, target, *arguments = sys.argv[1:]
    folder, local_rank = Path(os.environ[FOLDER_VARIABLE]), int(os.environ["LOCAL_RANK"])
    end_with_parent()
    if CORES in os.environ:
        bind(os.environ[CORES], local_rank)
    log = folder / f"rank{os.environ['RANK']}.log"
    if local_rank > 0:
        _redirect(log)
    else:
        if (folder / FIRST_LOG).exists():  # not so after a restart
            (folder / FIRST_LOG).rename(log)
        sys.excepthook = _show_what_the_launcher_does_not
    sys.argv = [target, *arguments]
    try:
        if kind == "module":
            sys.path[0] = str(Path.cwd())
            runpy.run_module(target, run_name="__main__", alter_sys=True)
        else:
            sys.path[0] = str(Path(target).resolve().parent)
            runpy.run_path(target, run_name="__main__")
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except SystemExit as error:
        if error.code not in (None, 0):
            _record(folder, error, f"the script exited with {error.code!r}")
        raise
    except BaseException as error:  # noqa: BLE001 - the outermost frame: recorded, shown, ended
        _record(folder, error, _message(error))
        error.__traceback__ = _own_frames(error.__traceback__)
        if isinstance(error, DrivetrainError):  # its message says all; the record has the rest
            error.__traceback__ = error.__cause__ = error.__context__ = None
        sys.excepthook(type(error), error, error.__traceback__)  # also tells the other ranks
        sys.exit(1)


def end_with_parent() -> None:
    """Kill this process when the one that started it is gone, so that no rank is orphaned."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()


def _show_what_the_launcher_does_not(
    kind: type[BaseException], error: BaseException, frames: TracebackType | None
) -> None:
    if not issubclass(kind, DrivetrainError):  # whose message the launcher shows, once
        sys.__excepthook__(kind, error, frames)


def _redirect(path: Path) -> None:
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(file, stream.fileno())
    os.close(file)


def _record(folder: Path, error: BaseException, message: str) -> None:
    rank = int(os.environ["RANK"])
    frames = traceback.extract_tb(_own_frames(error.__traceback__))
    where = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else None
    content = {
        "rank": rank,
        "local_rank": int(os.environ["LOCAL_RANK"]),
        "time_ns": time.time_ns(),
        "message": message,
        # Of another rank's failure, most often; that may be one without a word, by a signal.
        "follows": isinstance(error, CommunicationError),
        "says_all": isinstance(error, DrivetrainError),
        "where": where,
        "traceback": "".join(traceback.format_exception(error)),
    }
    path = folder / f"rank{rank}.error.json"
    path.write_text(json.dumps(content, indent=2), "utf-8")


def _message(error: BaseException) -> str:
    if isinstance(error, DrivetrainError):
        return f"{type(error).__name__}: {error}"
    return "".join(traceback.format_exception_only(error)).strip()


def _own_frames(frames: TracebackType | None) -> TracebackType | None:
    """The traceback without the frames of this file and of ``runpy``."""
    while frames is not None and frames.tb_frame.f_code.co_filename in (__file__, "<frozen runpy>"):
        frames = frames.tb_next
    return frames


if __name__ == "__main__":
    main()
