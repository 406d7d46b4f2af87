"""Parameters that stay in host memory or in files between their uses."""
