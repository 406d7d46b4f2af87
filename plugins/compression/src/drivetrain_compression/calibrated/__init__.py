"""Methods after training, and the pass of calibration data through a model."""
