"""``drivetrain compress``."""
