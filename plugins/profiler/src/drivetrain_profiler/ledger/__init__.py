"""Where the seconds of a run went, in columns that add up to its wall time."""
