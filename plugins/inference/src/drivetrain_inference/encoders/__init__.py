"""Encoders: texts as vectors, and texts sorted into classes, in batches."""
