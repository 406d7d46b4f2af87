"""Memory for keys and values: blocks, who has them, and where a forward's tokens go in them."""
