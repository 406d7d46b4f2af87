"""Parts of weights that are left out, and removed."""
