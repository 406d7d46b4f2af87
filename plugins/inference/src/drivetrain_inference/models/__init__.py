"""Ways to compute a module over a paged cache."""
