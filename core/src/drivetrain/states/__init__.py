"""Replicated model states: gradients, buckets, and the home on the device."""
