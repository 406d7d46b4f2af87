"""Changes of a model's matrices that requests choose one of."""
