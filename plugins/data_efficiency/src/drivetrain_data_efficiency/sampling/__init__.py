"""Which samples come when: a curriculum by metrics, and micro-batches by tokens."""
