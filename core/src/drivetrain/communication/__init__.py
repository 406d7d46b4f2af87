"""Process groups, collectives over ``torch.distributed``, and failures of ranks."""
