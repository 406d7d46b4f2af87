"""Number formats as pure functions of tensors."""
