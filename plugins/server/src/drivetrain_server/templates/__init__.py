"""Chat templates, rendered where they can do no harm."""
