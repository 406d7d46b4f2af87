"""Compression while a model trains."""
