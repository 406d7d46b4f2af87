"""Blocks of a model computed a chunk of the sequence at a time (FPDT, arXiv 2408.16830)."""
