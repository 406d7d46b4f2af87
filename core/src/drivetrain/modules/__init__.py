"""What is done to the client's module before states: memory, values, the way to the device."""
