"""Dtypes of compute, loss scaling, and losses that are not finite."""
