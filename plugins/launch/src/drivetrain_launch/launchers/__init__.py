"""How the hosts of a job are started: one class for each program that does it."""
