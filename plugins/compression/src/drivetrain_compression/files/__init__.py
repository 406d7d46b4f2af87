"""Files that compressed models are written to."""
