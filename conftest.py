"""Settings of the tests of every package."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

# No test is timed, neither as a whole nor in making its examples: a busy machine is no bug.
settings.register_profile("drivetrain", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("drivetrain")
