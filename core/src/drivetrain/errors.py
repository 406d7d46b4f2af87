"""The exceptions of the project. Every message says what was wrong, where, and what to do."""

from __future__ import annotations


class DrivetrainError(Exception):
    """Base of every error that Drivetrain raises on purpose."""


class ConfigError(DrivetrainError):
    """A configuration that cannot be run; ``problems`` holds every finding, not just the first.

    Args:
        problems: one message or several. Each names its config path.
    """

    def __init__(self, problems: str | list[str]) -> None:
        self.problems: list[str] = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class PluginError(DrivetrainError):
    """A plugin that cannot be found, imported or registered; names it and its distribution."""


class CheckpointError(DrivetrainError):
    """A checkpoint that is missing, damaged, or does not fit the job."""


class BuildError(DrivetrainError):
    """A native kernel that could not be built; names the op, the command and the first error."""


class CommunicationError(DrivetrainError):
    """A collective that failed, or ranks that disagree; names the rank at fault if known."""


class TrainingError(DrivetrainError):
    """A training loop that used the engine wrongly, or numbers that cannot be trained on."""
