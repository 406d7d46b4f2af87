"""DeepSpeed's logger and its helpers for ranks."""

from __future__ import annotations

import logging
from collections.abc import Collection
from functools import lru_cache

from drivetrain.communication.process_group import Ranks
from drivetrain.errors import ConfigError

logger = logging.getLogger("deepspeed")
"""The logger that scripts and frameworks set a level of."""


def log_dist(message: str, ranks: Collection[int] | None = None, level: int = logging.INFO) -> None:
    """Log a message on some ranks.

    Args:
        message: what to log, after the rank.
        ranks: which ones; all if there are none, or if -1 is among them.
        level: of the record.
    """
    rank = Ranks.current().rank
    if not ranks or -1 in ranks or rank in ranks:
        logger.log(level, "[rank %d] %s", rank, message)


@lru_cache(maxsize=1024)
def log_dist_once(message: str, ranks: tuple[int, ...] = (), level: int = logging.INFO) -> None:
    """Log a message once in this process; see :func:`log_dist`."""
    log_dist(message, ranks, level)


def set_log_level_from_string(log_level: str, custom_logger: logging.Logger | None = None) -> None:
    """Set the level of DeepSpeed's logger by name.

    Raises:
        ConfigError: there is no such level, or ``log_level`` is no text, as configs may have it.
    """
    level = logging.getLevelNamesMapping().get(str(log_level).upper())
    if level is None:
        raise ConfigError(
            f"log level {log_level!r} is none of debug, info, warning, error, critical"
        )
    (custom_logger or logger).setLevel(level)
