"""Models that are shards from their construction on: ``zero.Init``."""
