"""Commands by DeepSpeed's names."""
