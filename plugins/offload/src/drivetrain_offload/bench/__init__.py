"""``drivetrain bench io``: what disks do under which settings."""
