"""An image classifier from the command line: config file, loader of the engine, epochs."""

import argparse

import deepspeed
import torch
from data import Net, dataset
from torch.nn.functional import cross_entropy

parser = argparse.ArgumentParser()
parser.add_argument("--local_rank", type=int, default=-1)
parser.add_argument("--epochs", type=int, default=2)
parser = deepspeed.add_config_arguments(parser)
args = parser.parse_args()

deepspeed.init_distributed()
torch.manual_seed(0)
net = Net()
parameters = filter(lambda p: p.requires_grad, net.parameters())
engine, optimizer, loader, _ = deepspeed.initialize(
    args=args, model=net, model_parameters=parameters, training_data=dataset()
)
half = engine.fp16_enabled()

losses = []
for _ in range(args.epochs):
    for batch in loader:
        inputs, labels = (item.to(engine.local_rank if half else engine.device) for item in batch)
        loss = cross_entropy(engine(inputs), labels)
        engine.backward(loss)
        engine.step()
        deepspeed.comm.all_reduce(loss.data, op=deepspeed.comm.ReduceOp.AVG)
        losses.append(loss.item())
