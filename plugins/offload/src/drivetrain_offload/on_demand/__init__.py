"""States that leave the device between phases of a job."""
