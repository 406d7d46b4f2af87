"""Finds the config with which a script runs fastest: ``drivetrain tune``."""
