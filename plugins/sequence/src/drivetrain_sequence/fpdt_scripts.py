"""Layers in chunks of the sequence, for scripts that put models together, by DeepSpeed's names.

With the config's ``sequence_parallel.chunk`` repeated blocks of any model are computed so; see
[Note: FPDT] in ``chunks/block.py``. These are for scripts that hand weights of their own to single
layers. Tokens come first here, [s, b, width], and each rank has its part of every chunk, as
``FPDT_InputConstruct`` makes it.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from drivetrain.errors import ConfigError, TrainingError
from drivetrain.job.accelerator_choice import HostAccelerator, choose_accelerator
from drivetrain_sequence.blocks import Scoring
from drivetrain_sequence.chunks.draws import Casts
from drivetrain_sequence.chunks.elsewhere import Elsewhere
from drivetrain_sequence.chunks.sums import GradientSums
from drivetrain_sequence.chunks.work import Attended, Work
from drivetrain_sequence.group import GroupLine
from drivetrain_sequence.heads import HeadShare, from_heads, to_heads
from drivetrain_sequence.layout import Cut
from drivetrain_sequence.losses import token_losses
from drivetrain_sequence.tiles import in_tiles
from drivetrain_sequence.visible import Seen

Rotary = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines of all tokens, [S, ..., r] each."""


class FPDT_Attention(nn.Module):  # noqa: N801  # DeepSpeed's name
    """Causal attention with its projections, a chunk of the sequence at a time.

    Args:
        config: has ``hidden_size``, ``num_attention_heads``, ``num_key_value_heads``,
            ``kv_channels`` (width of a head) and ``attention_dropout``, which has to be 0.
        first_weight: [(heads + 2 * key heads) * width of a head, hidden size]: rows for queries,
            then for keys, then for values.
        first_bias: as many numbers, or ``None``.
        second_weight: [hidden size, heads * width of a head].
        second_bias: [hidden size], or ``None``.
        sequence_process_group: ranks that share sequences, in order; ``None`` for all.
        gather_idx: dimension of tokens, 0.
        scatter_idx: dimension of heads, 2.
        return_bias: return ``second_bias`` beside the result in place of adding it.
        chunk_size: tokens of a chunk, of all ranks together; a multiple of the ranks.
        enable_offloading: let chunks wait in host memory.

    Raises:
        ConfigError: dropout of attention weights, heads that ranks cannot share, other dimensions,
            or a chunk that the ranks do not divide.
    """

    def __init__(
        self,
        config: Any,
        first_weight: torch.Tensor,
        first_bias: torch.Tensor | None,
        second_weight: torch.Tensor,
        second_bias: torch.Tensor | None,
        sequence_process_group: dist.ProcessGroup | None,
        gather_idx: int = 0,
        scatter_idx: int = 2,
        return_bias: bool = True,
        chunk_size: int = 65536,
        enable_offloading: bool = True,
    ) -> None:
        super().__init__()
        if (gather_idx, scatter_idx) != (0, 2):
            raise ConfigError(
                f"gather_idx {gather_idx} and scatter_idx {scatter_idx}: FPDT_Attention takes "
                "[s, b, width], and makes heads of the last dimension: leave them out"
            )
        if getattr(config, "attention_dropout", 0.0):
            raise ConfigError(
                f"attention_dropout {config.attention_dropout}: weights of attention are not "
                "dropped where it is computed in chunks: set it to 0"
            )
        self._line = GroupLine(sequence_process_group)
        if chunk_size % self._line.size:
            raise ConfigError(
                f"a chunk_size of {chunk_size} tokens is not as many for each of "
                f"{self._line.size} ranks"
            )
        self._heads = (config.num_attention_heads, config.num_key_value_heads, config.kv_channels)
        HeadShare.of(*self._heads[:2], self._line.size)
        self.qkv_linear_weight, self.qkv_linear_bias = first_weight, first_bias
        self.qkv_dense_weight, self.qkv_dense_bias = second_weight, second_bias
        self.return_bias = return_bias
        self.chunk_size = chunk_size
        self.enable_offloading = enable_offloading

    def forward(
        self,
        layernorm_output: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        inference_params: Any | None = None,
        rotary_pos_emb: Rotary | None = None,
        cpu_offloading: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend.

        Args:
            layernorm_output: [s, b, hidden size] of this rank's tokens.
            attention_mask: ``None``: each token sees those up to its own place.
            inference_params: ``None``.
            rotary_pos_emb: cosines and sines of all tokens in their order, [S, 1, 1, r].
            cpu_offloading: let chunks wait in host memory, if ``enable_offloading`` does, too.

        Returns:
            [s, b, hidden size], and the bias that is not added yet, or ``None``.

        Raises:
            TrainingError: a mask or a cache; rotations of fewer tokens than there are.
        """
        for name, given in (("mask", attention_mask), ("cache", inference_params)):
            if given is not None:
                raise TrainingError(
                    f"FPDT_Attention takes no {name}: chunks of the sequence are plainly causal"
                )
        x, size = layernorm_output, self._line.size
        chunks = Cut(size, chunk=self.chunk_size).chunks(x.shape[0] * size)
        rotary = None if rotary_pos_emb is None else _of_places(rotary_pos_emb, chunks[-1].stop)
        offload = self.enable_offloading and cpu_offloading
        host = x.device.type == "cpu"
        elsewhere = Elsewhere(
            HostAccelerator() if host else choose_accelerator(), x.device, offload
        )
        call = _Call(self._line, self._heads, chunks, rotary, elsewhere, Casts(x.device))
        attended = _Attention.apply(call, x, self.qkv_linear_weight, self.qkv_linear_bias)  # type: ignore[no-untyped-call]
        added = None if self.return_bias else self.qkv_dense_bias
        output = nn.functional.linear(attended.flatten(2), self.qkv_dense_weight, added)
        return output, self.qkv_dense_bias if self.return_bias else None


def _of_places(rotary: Rotary, length: int) -> Rotary:
    """Cosines and sines [S, r] of ``length`` tokens."""
    cos, sin = (x.reshape(-1, x.shape[-1]) for x in rotary)
    if len(cos) < length or len(sin) < length:
        raise TrainingError(
            f"rotary_pos_emb is of {min(len(cos), len(sin))} tokens, and sequences have {length} "
            "on all ranks together: give that of the whole sequence"
        )
    return cos[:length], sin[:length]


def _rotated(x: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    """Rotate the first r features of x [b, h, c, d] by angles of its tokens, in two halves."""
    cos, sin = rotary
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    one, other = turned.chunk(2, -1)
    return torch.cat([turned * cos + torch.cat([-other, one], -1) * sin, rest], -1)


@dataclass(eq=False)
class _Call:
    """One forward of a layer, and what its backward repeats.

    Args:
        line: ranks that share sequences.
        heads: of queries and of keys, and the width of each.
        chunks: places in the whole sequence.
        rotary: of all tokens.
        elsewhere: where chunks wait.
        casts: the autocast around the forward.
    """

    line: GroupLine
    heads: tuple[int, int, int]
    chunks: list[range]
    rotary: Rotary | None
    elsewhere: Elsewhere
    casts: Casts

    def part(self, number: int) -> range:
        """This rank's tokens of a chunk, among all of its tokens."""
        chunk, size = self.chunks[number], self.line.size
        return range(chunk.start // size, chunk.stop // size)

    def attend(
        self, work: Work, number: int, x: torch.Tensor, weights: tuple[torch.Tensor | None, ...]
    ) -> torch.Tensor:
        """[c, b, heads, width of a head] of this rank's part x [c, b, hidden size] of a chunk."""
        work.begin(range(number, number + 1))
        heads, key_heads, width = self.heads
        weight, bias = weights
        assert weight is not None
        projected = nn.functional.linear(x, weight, bias)
        each = projected.split([heads * width, key_heads * width, key_heads * width], -1)  # type: ignore[no-untyped-call]
        parts = (y.unflatten(-1, (-1, width)).permute(1, 2, 0, 3) for y in each)  # [b, h, c, d]
        query, key, value = to_heads(self.line, *parts)
        if self.rotary is not None:
            chunk = self.chunks[number]
            cos, sin = (y[chunk.start : chunk.stop].to(query) for y in self.rotary)
            query, key = _rotated(query, (cos, sin)), _rotated(key, (cos, sin))
        scoring, seen = Scoring(width**-0.5), Seen(query, causal=True)
        output = work.attend(query, key, value, None, scoring, seen, None)
        return from_heads(self.line, output.transpose(1, 2), heads).transpose(0, 1)


class _Attention(torch.autograd.Function):
    """All chunks of one call, and their gradients from the last chunk to the first."""

    @staticmethod
    def forward(
        ctx: Any, call: _Call, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        work = Work(call.chunks, call.elsewhere)
        found = []
        with call.casts.again():
            for number in range(len(call.chunks)):
                part = call.part(number)
                own = x[part.start : part.stop]
                found.append(call.attend(work, number, own, (weight, bias)))
        kept = call.elsewhere.keep_whole(x) if x.requires_grad else x
        call.elsewhere.settle()
        ctx.call, ctx.device = call, x.device
        ctx.save_for_backward(kept, weight, bias, *work.calls[0].saved())
        return torch.cat(found)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        call: _Call = ctx.call
        x, weight, bias, *saved = ctx.saved_tensors
        work = Work(call.chunks, call.elsewhere, [Attended().restored(saved)], again=True)
        needed = ctx.needs_input_grad[1:]
        weights = tuple(
            None if p is None else p.detach().requires_grad_(needs)
            for p, needs in zip((weight, bias), needed[1:], strict=True)
        )
        trained = [p for p in weights if p is not None and p.requires_grad]
        sums = GradientSums([x if needed[0] else None], [0], trained, ctx.device)
        for number in reversed(range(len(call.chunks))):
            part = call.part(number)
            own = x[part.start : part.stop].to(ctx.device).detach().requires_grad_(needed[0])
            with call.casts.again(), torch.enable_grad():
                output = call.attend(work, number, own, weights)
            sums.add(part, [own], [output], [gradient[part.start : part.stop]])
        for_x, *others = sums.found()
        rest = iter(others)
        for_weights = (None if p is None or not p.requires_grad else next(rest) for p in weights)
        return None, for_x, *for_weights


class FPDT_FFN:  # noqa: N801  # DeepSpeed's name
    """``FPDT_FFN.apply``: an MLP with GELU, a chunk of tokens at a time, and again in backward."""

    @staticmethod
    def apply(
        x: torch.Tensor,
        w1: torch.Tensor,
        b1: torch.Tensor | None,
        w2: torch.Tensor,
        b2: torch.Tensor | None,
        add_bias: bool,
        chunk_size: int,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the MLP's result, and the second bias if that is not added.

        Args:
            x: [s, b, width].
            w1: [inner width, width].
            b1: [inner width], or ``None``.
            w2: [width, inner width].
            b2: [width], or ``None``.
            add_bias: add ``b2`` to the result.
            chunk_size: tokens of this rank at a time; the last chunk may be short.
        """

        def mlp(part: torch.Tensor) -> torch.Tensor:
            inner = nn.functional.gelu(nn.functional.linear(part, w1, b1), approximate="tanh")
            return nn.functional.linear(inner, w2, b2 if add_bias else None)

        return in_tiles(mlp, x, chunk_size, 0), None if add_bias else b2


class FPDT_LogitsLoss:  # noqa: N801  # DeepSpeed's name
    """``FPDT_LogitsLoss.apply``: logits and losses, a chunk of tokens at a time."""

    @staticmethod
    def apply(
        lm_output: torch.Tensor,
        labels: torch.Tensor,
        logit_weights: torch.Tensor,
        rank: int,
        spg_size: int,
        spg: dist.ProcessGroup | None,
        num_chunk: int,
    ) -> torch.Tensor:
        """Return the losses of the tokens of all ranks, rank after rank.

        Logits are computed again in backward; hidden states wait for that in host memory.

        Args:
            lm_output: [s, b, width] of this rank's tokens.
            labels: [b, s]; -100 for tokens that do not count.
            logit_weights: [vocabulary, width].
            rank: of this one in the group.
            spg_size: ranks in the group.
            spg: ranks that share sequences; ``None`` for all.
            num_chunk: into how many chunks the tokens are cut.

        Returns:
            [S, b], at least in float32, of which this rank's part has a gradient.

        Raises:
            ConfigError: the group has another size, or this rank another place in it.
        """
        line = GroupLine(spg)
        if (rank, spg_size) != (line.rank, line.size):
            raise ConfigError(
                f"FPDT_LogitsLoss is told of rank {rank} of {spg_size}, and the group has this as "
                f"rank {line.rank} of {line.size}"
            )

        def losses(hidden: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            return token_losses(nn.functional.linear(hidden, logit_weights), target)

        away = nullcontext() if lm_output.device.type == "cpu" else save_on_cpu()
        pairs = zip(lm_output.chunk(num_chunk), labels.t().chunk(num_chunk), strict=True)
        with away:
            found = [checkpoint(losses, *pair, use_reentrant=False) for pair in pairs]
        return line.all_gather(torch.cat(found))
