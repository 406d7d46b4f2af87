"""States on the host, an optimizer and a schedule of the script's own, and accumulation."""

import deepspeed
import torch
from data import Net, batches
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.utils import groups, log_dist, logger
from torch.nn.functional import cross_entropy

config = {
    "train_batch_size": 16,
    "train_micro_batch_size_per_gpu": 4,
    "steps_per_print": 1000,
    "gradient_clipping": 0.0,
    "zero_allow_untested_optimizer": True,
    "zero_optimization": {
        "stage": 2,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "overlap_comm": True,
        "contiguous_gradients": True,
        "reduce_bucket_size": 5e8,
    },
}
torch.manual_seed(0)
net = Net()
decayed = [p for p in net.parameters() if p.dim() > 1]
others = [p for p in net.parameters() if p.dim() == 1]
optimizer = DeepSpeedCPUAdam(
    [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
    lr=0.01,
    betas=(0.9, 0.95),
)
schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
engine, optimizer, _, schedule = deepspeed.initialize(
    model=net, optimizer=optimizer, lr_scheduler=schedule, config_params=config
)
logger.setLevel("WARNING")
log_dist("begin", ranks=[0])
assert engine.gradient_accumulation_steps() == 2
assert engine.zero_offload_optimizer().device == "cpu"
assert groups.get_data_parallel_world_size() == 2

losses = []
for number, (inputs, labels) in enumerate(batches(engine.global_rank, 6)):
    loss = cross_entropy(engine(inputs.to(engine.device)), labels.to(engine.device))
    engine.backward(loss)
    assert engine.is_gradient_accumulation_boundary() == (number % 2 == 1)
    engine.step()
    deepspeed.comm.all_reduce(loss.data, group=groups.get_data_parallel_group())
    losses.append(loss.item() / deepspeed.comm.get_world_size())
assert optimizer.param_groups[0]["lr"] == schedule.get_last_lr()[0]
