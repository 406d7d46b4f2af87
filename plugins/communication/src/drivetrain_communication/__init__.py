"""Fewer bytes: compressed collectives, training that communicates rarely, and measurements."""
