"""Homes of optimizer states in host memory."""
