"""The exceptions of the project. Every message says what was wrong, where, and what to do."""

from __future__ import annotations

from drivetrain.wording import printable

_MOST = 100
_LONGEST = 4000


class DrivetrainError(Exception):
    """Base of every error that Drivetrain raises on purpose.

    Args:
        message: shown with escapes for control characters, since it may quote a file or the name of
            a file, which must not take command of a terminal.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(printable(message, keep="\n\t"))


class ConfigError(DrivetrainError):
    """A configuration that cannot be run; ``problems`` holds every finding, not just the first.

    Findings beyond the first hundred are only counted, and long ones are cut in their middle.

    Args:
        problems: one message or several. Each names its config path.
    """

    def __init__(self, problems: str | list[str]) -> None:
        found = [problems] if isinstance(problems, str) else list(problems)
        more = [f"and {len(found) - _MOST} more problems"] if len(found) > _MOST else []
        self.problems: list[str] = [*map(_shortened, found[:_MOST]), *more]
        super().__init__("\n".join(self.problems))


class PluginError(DrivetrainError):
    """A plugin that cannot be found, imported or registered; names it and its distribution."""


class CheckpointError(DrivetrainError):
    """A checkpoint that is missing, damaged, or does not fit the job.

    Attributes:
        other_version: the checkpoint may be whole, but another version of Drivetrain wrote it.
    """

    other_version = False


class BuildError(DrivetrainError):
    """A native kernel that could not be built; names the op, the command and the first error."""


class CommunicationError(DrivetrainError):
    """A collective that failed, or ranks that disagree; names the rank at fault if known."""


class TrainingError(DrivetrainError):
    """A training loop that used the engine wrongly, or numbers that cannot be trained on."""


def _shortened(problem: str) -> str:
    half = _LONGEST // 2
    return problem if len(problem) <= _LONGEST else f"{problem[:half]} ... {problem[-half:]}"
