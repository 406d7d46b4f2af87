"""States in files, tile after tile."""
