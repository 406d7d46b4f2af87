"""The command line ``drivetrain NAME``; every name is an entry of ``drivetrain.commands``."""
