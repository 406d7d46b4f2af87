"""Which tensors a step has at the peak of its memory, and where in the model they come from."""
