"""Running a schedule: micro-batches through the chunks of a rank, messages between ranks."""
