"""Host memory, the thread that works on it, and copies from and to the device."""
