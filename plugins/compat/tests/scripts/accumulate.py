"""A framework's loop: the boundary is set by hand, the loss scaled by it, the norm is read."""

import deepspeed
import torch
from data import Net, batches
from torch.nn.functional import cross_entropy

config = {
    "train_batch_size": 24,
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 3,
    "gradient_clipping": 0.05,
    "steps_per_print": float("inf"),
    "fp16": {"enabled": False},
    "bf16": {"enabled": False},
    "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "none", "nvme_path": None}},
}
deepspeed.init_distributed()
torch.manual_seed(0)
net = Net()
optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
engine, optimizer, _, _ = deepspeed.initialize(model=net, optimizer=optimizer, config=config)
engine.get_global_grad_norm()

losses = []
for number, (inputs, labels) in enumerate(batches(engine.global_rank, 6)):
    sync = (number + 1) % 3 == 0
    loss = cross_entropy(engine(inputs), labels)
    engine.set_gradient_accumulation_boundary(is_boundary=sync)
    engine.backward(loss)
    if sync:
        engine.step()
        assert engine.get_global_grad_norm() > 0.05
    else:
        engine.step()
    deepspeed.comm.all_reduce(loss.data)
    losses.append(loss.item() / engine.world_size)
assert engine.global_steps == 2
