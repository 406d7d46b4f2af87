"""Buckets of which each rank keeps a shard, and what lies in them."""
