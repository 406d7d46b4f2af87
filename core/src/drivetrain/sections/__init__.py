"""Core's own config sections, written as plugins."""
