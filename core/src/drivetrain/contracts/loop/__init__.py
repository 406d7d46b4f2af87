"""What surrounds a step: transforms, batches, loaders, runners, reports."""
