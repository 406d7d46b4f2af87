"""What a plugin is: its class, its config sections, and every hook."""
