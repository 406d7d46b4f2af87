"""Which tokens which layers see: random layer-wise token dropping (random-LTD)."""
