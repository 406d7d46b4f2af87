"""ZeRO for Drivetrain: model states sharded over data-parallel ranks (arXiv:1910.02054)."""
