"""Whole global batches at a time, from a loader that repeats, with evaluation between them."""

import deepspeed
import torch
from data import Net, dataset
from deepspeed.runtime.lr_schedules import WarmupLR
from deepspeed.utils import RepeatingLoader
from torch.nn.functional import cross_entropy


class Loss(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.net = Net()

    def forward(self, inputs, labels):
        return cross_entropy(self.net(inputs), labels)


config = {
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 1,
    "gradient_clipping": 0.0,
    "wandb": {"project": "never switched on"},
    "flops_profiler": {"profile_step": 1},
    "zero_optimization": {"stage": 1, "cpu_offload": False},
    "some_key_of_the_scripts_own": 3,
}
torch.manual_seed(0)
model = Loss()
model.net.first.bias.requires_grad_(False)
engine, optimizer, loader, schedule = deepspeed.initialize(
    config=config,
    model=model,
    model_parameters=[p for p in model.parameters() if p.requires_grad],
    optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.2, momentum=0.9),
    lr_scheduler=lambda optimizer: WarmupLR(optimizer, warmup_num_steps=3, warmup_type="linear"),
    training_data=dataset(),
    dist_init_required=True,
)
assert isinstance(engine, deepspeed.DeepSpeedEngine)
assert isinstance(optimizer, torch.optim.Optimizer)
assert engine.get_batch_info() == (8, 4, 1)

losses = []
repeated = iter(RepeatingLoader(loader))
for _ in range(6):
    engine.train()
    inputs, labels = next(repeated)
    loss = engine(inputs, labels)
    engine.backward(loss)
    engine.step()
    deepspeed.comm.all_reduce(loss.data, op=deepspeed.comm.ReduceOp.AVG)
    losses.append(loss.item())
    engine.eval()
    with torch.no_grad():
        engine(inputs, labels)
assert engine.skipped_steps == 0
assert not optimizer.overflow
