"""Devices, mesh axes and collectives, as plugins see them."""
