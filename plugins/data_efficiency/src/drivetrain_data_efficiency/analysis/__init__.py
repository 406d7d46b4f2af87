"""What is known of a data set's samples: indexed files, metrics, and how these are computed."""
