"""Names of DeepSpeed that this package serves."""
