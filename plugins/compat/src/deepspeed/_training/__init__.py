"""``initialize`` and the engine that it returns."""
