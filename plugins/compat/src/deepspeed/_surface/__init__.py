"""Which names ``deepspeed`` has, where each leads, and the modules that show them."""
