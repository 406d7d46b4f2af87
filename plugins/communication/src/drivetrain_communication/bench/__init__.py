"""``drivetrain bench comm``: what collectives take, by size."""
