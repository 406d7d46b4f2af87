"""Collectives that travel compressed, whoever issues them."""
