"""Model states and activations in host memory and on NVMe."""
