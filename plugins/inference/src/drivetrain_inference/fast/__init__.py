"""Decoders whose structure is known, computed without their modules' code."""
