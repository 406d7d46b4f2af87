"""What a job would take, found by walking through its steps without memory: ``drivetrain plan``."""
