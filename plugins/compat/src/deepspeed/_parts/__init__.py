"""Small modules of DeepSpeed that scripts use beside the engine."""
