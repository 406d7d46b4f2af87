"""Engines in processes of their own, and how requests find their way to them."""
