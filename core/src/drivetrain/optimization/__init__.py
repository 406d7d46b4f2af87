"""Update rules made of torch's optimizers, the optimizer's facade, and schedules."""
