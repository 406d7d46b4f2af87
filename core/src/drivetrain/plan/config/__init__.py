"""Reading a config, laying overlays over it, and composing it into plugins."""
