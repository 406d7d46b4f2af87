"""A config of DeepSpeed, read as Drivetrain reads one."""
