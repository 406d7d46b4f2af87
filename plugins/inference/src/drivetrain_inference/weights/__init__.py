"""Weights that lie in memory otherwise than as plain tensors."""
