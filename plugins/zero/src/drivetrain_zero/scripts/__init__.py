"""What scripts call: whole parameters, single states, estimates, export."""
