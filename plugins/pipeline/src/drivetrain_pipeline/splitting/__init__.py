"""Splitting a model of repeated units between stages, without rewriting it."""
