"""The process below ``drivetrain run``: torchrun, with its own messages and findings in files."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from pathlib import Path

from drivetrain_cli.rank import end_with_parent

WANTED = "DRIVETRAIN_SPARE_WANTED"
"""Set where ranks are to be copies of a spare."""

INTERRUPTED = 128 + signal.SIGINT


def main() -> int:
    """Run torchrun with ``sys.argv[2:]``; write what it finds to the folder ``sys.argv[1]``."""
    folder, arguments = Path(sys.argv[1]), sys.argv[2:]
    end_with_parent()
    _log_to(folder / "agent.log")
    try:
        from torch.distributed import run
        from torch.distributed.elastic.multiprocessing import SignalException
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

        from drivetrain_cli.roll_call import RollCall
    except KeyboardInterrupt:
        return INTERRUPTED
    for name in ("torch", "torch.distributed"):  # which log to our standard error by themselves
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True
    if os.environ.get(WANTED):
        _start_spare()
    options = run.parse_args(arguments)  # type: ignore[no-untyped-call]
    RollCall.start_for(options)
    try:
        run.run(options)  # type: ignore[no-untyped-call]
    except ChildFailedError as error:
        failures = {
            str(rank): {"exit_code": failure.exitcode, "local_rank": failure.local_rank}
            for rank, failure in error.failures.items()
        }
        (folder / "failures.json").write_text(json.dumps(failures, indent=2), "utf-8")
        return 1
    except (SignalException, KeyboardInterrupt):
        return INTERRUPTED
    except Exception as error:
        logging.getLogger(__name__).exception("torchrun failed")
        message = {"message": f"{type(error).__name__}: {error}"}
        (folder / "agent.error.json").write_text(json.dumps(message, indent=2), "utf-8")
        return 1
    return 0


def _start_spare() -> None:
    """Start the spare, and tell ranks where it listens, and that this process owns their keeper."""
    from drivetrain_cli.spare import VARIABLE, SpareStarter

    starter = SpareStarter()
    os.environ[VARIABLE] = starter.name_of_socket
    # Ranks are the spare's children; what outlives them belongs to the process that restarts them.
    os.environ.setdefault("DRIVETRAIN_KEEPER_OWNER", str(os.getpid()))
    starter.start()


def _log_to(path: Path) -> None:
    """Send torchrun's log messages and warnings to a file instead of into the script's output."""
    handler = logging.FileHandler(path, delay=True)
    logging.basicConfig(handlers=[handler], format="%(asctime)s %(levelname)s %(message)s")
    logging.captureWarnings(True)


if __name__ == "__main__":
    sys.exit(main())
