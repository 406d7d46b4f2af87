"""Where numbers live: parameters, buckets, homes, model states, fragments."""
