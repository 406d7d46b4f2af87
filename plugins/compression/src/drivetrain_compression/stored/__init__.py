"""Weights that stay packed in few bits while a model is trained around them, or serves."""
