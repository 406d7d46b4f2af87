"""Data sets in shards: tar files and Parquet, read by number in an order that needs no state."""
