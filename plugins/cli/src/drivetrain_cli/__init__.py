"""The commands of ``drivetrain``; core finds each as an entry of ``drivetrain.commands``."""
