"""Files of a checkpoint: storage, tensors, index, commit."""
