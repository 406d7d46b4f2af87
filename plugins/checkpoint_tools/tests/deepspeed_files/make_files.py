"""Makes the checkpoints in this folder, with DeepSpeed in an environment of its own.

    torchrun --nproc-per-node 2 make_files.py 0 fp32 z0        # and 1 bf16 z1, 2 bf16 z2, 3 bf16 z3
    python -m deepspeed.checkpoint.ds_to_universal --inject_missing_state \
        --input_folder z1/global_step3 --output_folder u1/global_step3    # and z3 as u3

``zero_to_*.py``, which DeepSpeed puts beside them, were removed. They were made with DeepSpeed
0.19.8, torch 2.13 and ``DS_ACCELERATOR=cpu``.
"""

import sys

import deepspeed
import torch


class Model(torch.nn.Module):
    """A tied weight, a frozen one, a buffer, and sizes that two ranks cannot share evenly."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(7, 4)
        self.hidden = torch.nn.Linear(4, 3)
        self.norm = torch.nn.LayerNorm(3)
        self.register_buffer("offset", torch.arange(3.0))
        self.frozen = torch.nn.Linear(3, 3, bias=False)
        self.head = torch.nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight
        self.back = torch.nn.Linear(3, 4)
        self.frozen.weight.requires_grad_(False)

    def forward(self, x, y):
        hidden = self.norm(self.hidden(self.embed(x))) + self.offset.to(self.hidden.weight.dtype)
        logits = self.head(self.back(self.frozen(hidden)))
        return torch.nn.functional.cross_entropy(logits.float(), y)


def main(stage, dtype, out):
    torch.manual_seed(0)
    model = Model()
    trained = [p for p in model.parameters() if p.requires_grad]
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 10}},
    }
    if dtype != "fp32":
        config[dtype] = {"enabled": True}
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in trained if p.dim() == 1], "weight_decay": 0.0},
    ]
    engine, *_ = deepspeed.initialize(model=model, model_parameters=groups, config=config)
    generator = torch.Generator().manual_seed(1)
    mine = slice(4 * engine.global_rank, 4 * engine.global_rank + 4)
    for _ in range(3):
        x, y = torch.randint(0, 7, (2, 8), generator=generator)
        engine.backward(engine(x[mine], y[mine]))
        engine.step()
    engine.save_checkpoint(out, client_state={"note": "three"})


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
