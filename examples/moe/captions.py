"""Caption pictures with vision experts and language experts (VL-MoE), experts on two ranks.

    drivetrain run --nproc 2 examples/moe/captions.py
    drivetrain moe load runs/captions/load.jsonl

Pictures have two coloured shapes, and captions say which and how they lie: "a red disc above a blue
cross". An eighth of all scenes is held out. Every layer has one attention over patches and words, a
mixture of experts for patches and one for words, as in Shen et al. 2023, "Scaling Vision-Language
Models with Sparse Mixture of Experts" (arXiv:2303.07226). Patches see patches, words see patches
and the words before them.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import torch
import torch.nn.functional as F
from drivetrain_moe import MoE
from torch import nn
from torch.utils.data import TensorDataset

import drivetrain
from drivetrain.engine.loader import RepeatingLoader

HERE = Path(__file__).resolve().parent

COLOURS = {
    "red": (1.0, 0.1, 0.1),
    "green": (0.1, 0.9, 0.1),
    "blue": (0.1, 0.2, 1.0),
    "yellow": (1.0, 0.9, 0.1),
}
SHAPES = {
    "square": ["111111", "111111", "111111", "111111", "111111", "111111"],
    "disc": ["001100", "011110", "111111", "111111", "011110", "001100"],
    "cross": ["001100", "001100", "111111", "111111", "001100", "001100"],
    "frame": ["111111", "100001", "100001", "100001", "100001", "111111"],
}
PLACES = {"beside": (0, 1), "above": (1, 0), "across": (1, 1)}
"""How the first shape, top left, lies to the second, and the quadrant (row, column) of that."""

WORDS = ["<start>", "<end>", "a", *COLOURS, *SHAPES, *PLACES]
SIDE, PATCH = 16, 4
PATCHES, LENGTH = (SIDE // PATCH) ** 2, 8


def scenes(copies: int, seed: int, *, held_out: bool) -> TensorDataset:
    """Pictures [N, 3, 16, 16] and captions [N, 9], of one part of all scenes.

    Args:
        copies: pictures of each scene; they differ by noise.
        seed: of the noise.
        held_out: the eighth that is not trained on, or the rest.
    """
    generator = torch.Generator().manual_seed(seed)
    kinds = list(itertools.product(COLOURS, SHAPES))
    every = list(itertools.product(kinds, kinds, PLACES))
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(0)).tolist()
    held = len(every) // 8
    pictures, captions = [], []
    for number in order[:held] if held_out else order[held:]:
        first, second, how = every[number]
        caption = ["<start>", "a", *first, how, "a", *second, "<end>"]
        for _ in range(copies):
            picture = 0.2 * torch.randn(3, SIDE, SIDE, generator=generator)
            for (colour, shape), (row, column) in zip(
                (first, second), ((0, 0), PLACES[how]), strict=True
            ):
                mask = torch.tensor([[float(dot) for dot in line] for line in SHAPES[shape]])
                top, left = 8 * row + 1, 8 * column + 1
                rgb = torch.tensor(COLOURS[colour]).view(3, 1, 1)
                picture[:, top : top + 6, left : left + 6] += mask * rgb
            pictures.append(picture)
            captions.append([WORDS.index(word) for word in caption])
    return TensorDataset(torch.stack(pictures), torch.tensor(captions))


class Block(nn.Module):
    """One attention over patches and words; experts of their own for each of the two."""

    def __init__(self, width: int, heads: int, experts: int, ep: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.experts_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

        def mixture() -> MoE:
            expert = nn.Sequential(
                nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
            )
            return MoE(width, expert, experts, ep, k=2, drop_tokens=False, balance_loss=0.01)

        self.vision, self.language = mixture(), mixture()

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """[batch, patches and words, width] -> the same shape."""
        batch, length, width = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, length, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        seen = self.experts_norm(x)
        patches, words = self.vision(seen[:, :PATCHES])[0], self.language(seen[:, PATCHES:])[0]
        return x + torch.cat([patches, words], 1)


class Captioner(nn.Module):
    """Predicts the words of a caption from a picture and the words before.

    Args:
        layers: number of blocks.
        width: channels.
        heads: of attention.
        experts: for patches, and as many for words, in each block.
        ep: ranks that share out the experts.
    """

    mask: torch.Tensor

    def __init__(self, layers: int, width: int, heads: int, experts: int, ep: int) -> None:
        super().__init__()
        self.patches = nn.Linear(3 * PATCH * PATCH, width)
        self.words = nn.Embedding(len(WORDS), width)
        self.places = nn.Parameter(0.1 * torch.randn(PATCHES + LENGTH, width))
        self.blocks = nn.ModuleList(Block(width, heads, experts, ep) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, len(WORDS))
        mask = torch.ones(PATCHES + LENGTH, PATCHES + LENGTH).tril().bool()
        mask[:PATCHES, :PATCHES] = True
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, pictures: torch.Tensor, captions: torch.Tensor) -> torch.Tensor:
        """Mean loss in nats a word; in evaluation logits of the next words.

        Args:
            pictures: [batch, 3, 16, 16].
            captions: [batch, 9], numbers of words, with start and end.

        Returns:
            0-d, or [batch, 8, words].
        """
        patches = F.unfold(pictures, PATCH, stride=PATCH).transpose(1, 2)
        x = torch.cat([self.patches(patches), self.words(captions[:, :-1])], 1) + self.places
        for block in self.blocks:
            x = block(x, self.mask)
        logits: torch.Tensor = self.head(self.norm(x[:, PATCHES:]))
        if not self.training:
            return logits
        return F.cross_entropy(logits.flatten(0, 1).float(), captions[:, 1:].flatten())


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Caption pictures with mixtures of experts.")
    add = parser.add_argument
    add("--config", type=Path, default=HERE / "captions.json")
    add("--out", type=Path, default=Path("runs/captions"), help="folder of all results")
    add("--steps", type=int, default=300, help="optimizer steps")
    add("--experts", type=int, default=4, help="for patches, and for words, of each layer")
    add("--ep", type=int, default=2, help="ranks that share out the experts")
    add("--layers", type=int, default=3)
    add("--width", type=int, default=64)
    add("--heads", type=int, default=4)
    return parser.parse_args()


def main() -> None:
    """Train, then caption the scenes that were held out."""
    args = arguments()
    torch.manual_seed(0)
    engine, _, loader, _ = drivetrain.initialize(
        model=Captioner(args.layers, args.width, args.heads, args.experts, args.ep),
        training_data=scenes(4, 1, held_out=False),
        config=args.config,
        overlays=[
            f"scheduler.params.total_num_steps={args.steps}",
            f"scheduler.params.warmup_num_steps={max(1, args.steps // 10)}",
            f"moe.load.file={args.out / 'load.jsonl'}",
        ],
    )
    assert loader is not None
    batches, first = RepeatingLoader(loader), engine.job.rank == 0
    for step in range(1, args.steps + 1):
        loss = engine.train_batch(batches).item()
        if first and (step % max(1, args.steps // 10) == 0 or step == args.steps):
            # With the balancing losses of six mixtures, which are 0.01 each where loads are even.
            print(f"step {step} of {args.steps}: loss {loss:.3f}", flush=True)
    pictures, captions = scenes(1, 2, held_out=True).tensors
    engine.eval()
    with torch.no_grad():  # every rank, as each has some of the experts
        said = engine(pictures.to(engine.device), captions.to(engine.device)).argmax(-1).cpu()
    right = (said == captions[:, 1:]).all(1)
    if first:
        for number in range(3):
            print(" ".join(WORDS[word] for word in said[number].tolist()))
        print(f"scenes never seen: {right.float().mean():.1%} of captions have no wrong word")
    engine.destroy()


if __name__ == "__main__":
    main()
