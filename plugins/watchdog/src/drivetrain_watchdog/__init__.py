"""Ranks that compare what they communicate, so that a hang names the rank that is missing."""
