"""An accelerator that Drivetrain's own packages know nothing of."""
