"""``drivetrain io-bench``: what disks do under which settings."""
