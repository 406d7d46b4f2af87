"""What scripts call by names that DeepSpeed gave it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from drivetrain.errors import ConfigError
from drivetrain_sequence.group import GroupLine
from drivetrain_sequence.heads import from_heads, to_heads
from drivetrain_sequence.losses import IGNORED, token_losses
from drivetrain_sequence.tiles import in_tiles

Reduction = Literal["mean", "sum"]


class DistributedAttention(nn.Module):
    """Attention over all tokens of some heads, for ranks that have some tokens of all heads.

    Args:
        local_attention: called as ``local_attention(query, key, value, *args, **kwargs)`` with all
            tokens of this rank's heads, laid out as the inputs are; returns the like of a query.
        sequence_process_group: the ranks that share sequences, in order.
        scatter_idx: dimension of heads, 2.
        gather_idx: dimension of tokens, which ``batch_dim_idx`` decides here.
        sp_stream: accepted; the exchange is on the current stream.

    Raises:
        ConfigError: another dimension of heads.
    """

    def __init__(
        self,
        local_attention: Callable[..., torch.Tensor],
        sequence_process_group: torch.distributed.ProcessGroup | None,
        scatter_idx: int = 2,
        gather_idx: int = 0,
        sp_stream: Any | None = None,
    ) -> None:
        super().__init__()
        if scatter_idx != 2:
            raise ConfigError(f"scatter_idx {scatter_idx}: heads are dimension 2 of [s, b, h, d]")
        self.local_attn = local_attention
        self._line = GroupLine(sequence_process_group)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        batch_dim_idx: int = 1,
        rotary_pos_emb: Any | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Attend.

        Args:
            query: this rank's tokens, [s, b, h, d], or [b, s, h, d] with ``batch_dim_idx`` 0.
            key: alike, with a divisor of the heads.
            value: like ``key``.
            batch_dim_idx: where the batch is.
            rotary_pos_emb: ``None``; rotate before.
            args: passed on.
            kwargs: passed on.

        Returns:
            Like ``query``.

        Raises:
            ConfigError: rotations are given.
        """
        if rotary_pos_emb is not None:
            raise ConfigError(
                "rotary_pos_emb: rotate queries and keys by the places of their tokens before "
                "DistributedAttention, which needs no more than this rank's"
            )
        order = (1, 2, 0, 3) if batch_dim_idx == 1 else (0, 2, 1, 3)
        back = (2, 0, 1, 3) if batch_dim_idx == 1 else (0, 2, 1, 3)
        parts = (x.permute(order) for x in (query, key, value))  # [b, h, s, d]
        whole = (x.permute(back) for x in to_heads(self._line, *parts))
        output = self.local_attn(*whole, *args, **kwargs)
        if output.dim() == 3:  # heads and width as one
            output = output.unflatten(2, (-1, value.shape[-1]))  # type: ignore[no-untyped-call]
        rows = output if batch_dim_idx == 0 else output.transpose(0, 1)
        own = from_heads(self._line, rows, query.shape[2])  # [b, s, h, d]
        return own if batch_dim_idx == 0 else own.transpose(0, 1)


def vocab_sequence_parallel_cross_entropy(
    vocab_seq_parallel_logits: torch.Tensor,
    target: torch.Tensor,
    sp_group: torch.distributed.ProcessGroup | None,
) -> torch.Tensor:
    """Losses of all tokens of sequences that ranks share.

    Args:
        vocab_seq_parallel_logits: [s, b, vocabulary] of this rank's tokens.
        target: [s, b].
        sp_group: the ranks of a sequence, in order.

    Returns:
        [S, b], of which this rank's part has a gradient.
    """
    return GroupLine(sp_group).all_gather(token_losses(vocab_seq_parallel_logits, target))


def sequence_tiled_compute(
    fn: Callable[..., Any],
    seqlen: int,
    shards: int,
    kwargs_to_shard: Mapping[str, torch.Tensor],
    kwargs_to_pass: Mapping[str, Any],
    grad_requiring_tensor_key: str,
    compute_params: Sequence[nn.Parameter] | None = None,
    output_unshard_dimension: int = 1,
    output_reduction: Reduction | None = "mean",
) -> torch.Tensor:
    """Compute a function of single tokens in tiles, and again in backward.

    Args:
        fn: called with the tiles and what is passed, by keyword.
        seqlen: tokens, along dimension 1 of what is cut.
        shards: number of tiles.
        kwargs_to_shard: what is cut.
        kwargs_to_pass: what every tile is given.
        grad_requiring_tensor_key: which of them has a gradient; each that requires one gets it.
        compute_params: accepted; gradients of parameters arrive once here.
        output_unshard_dimension: along which results are joined; 0 if they are single losses.
        output_reduction: what joined losses become; ``None`` joins only.

    Raises:
        ConfigError: what is cut does not have that many tokens.
    """
    wrong = {name: x.shape[1] for name, x in kwargs_to_shard.items() if x.shape[1] != seqlen}
    if wrong or grad_requiring_tensor_key not in {*kwargs_to_shard, *kwargs_to_pass}:
        what = wrong or f"no {grad_requiring_tensor_key}"
        raise ConfigError(f"sequence_tiled_compute: expected {seqlen} tokens, got {what}")

    def tile(**parts: torch.Tensor) -> Any:
        return fn(**parts, **kwargs_to_pass)

    cut = {name: torch.chunk(x, shards, 1) for name, x in kwargs_to_shard.items()}
    results = [
        checkpoint(tile, use_reentrant=False, **dict(zip(cut, parts, strict=True)))
        for parts in zip(*cut.values(), strict=True)
    ]
    if output_unshard_dimension > 0:
        return torch.cat(results, output_unshard_dimension)
    losses = torch.stack([result.reshape(()) for result in results])
    if output_reduction is None:
        return losses
    return losses.sum() if output_reduction == "sum" else losses.mean()


class SequenceTiledCompute:
    """``SequenceTiledCompute.apply``: the same, with what is cut and passed by position."""

    @staticmethod
    def apply(
        fn: Callable[..., Any],
        seqlen: int,
        shards: int,
        keys_to_shard: Sequence[str],
        keys_to_pass: Sequence[str],
        grad_requiring_tensor_key: str,
        compute_params: Sequence[nn.Parameter] | None,
        output_unshard_dimension: int,
        output_reduction: Reduction | None,
        *args: Any,
    ) -> torch.Tensor:
        """See :func:`sequence_tiled_compute`; ``args`` are values of the keys in their order."""
        count = len(keys_to_shard)
        return sequence_tiled_compute(
            fn,
            seqlen,
            shards,
            dict(zip(keys_to_shard, args[:count], strict=True)),
            dict(zip(keys_to_pass, args[count:], strict=True)),
            grad_requiring_tensor_key,
            compute_params,
            output_unshard_dimension,
            output_reduction,
        )


class TiledMLP:
    """``TiledMLP.apply``: an MLP in tiles."""

    @staticmethod
    def apply(
        fn: Callable[[nn.Module, torch.Tensor], torch.Tensor],
        mlp_module: nn.Module,
        x: torch.Tensor,
        shards: int,
        compute_params: Sequence[nn.Parameter] | None = None,
    ) -> torch.Tensor:
        """Return ``fn(mlp_module, x)`` for x [b, s, d] or [s, d], ``shards`` tiles of s in turn."""
        tile = -(-x.shape[-2] // shards)
        return in_tiles(lambda part: fn(mlp_module, part), x, tile, x.dim() - 2)


class TiledFusedLogitsLoss:
    """``TiledFusedLogitsLoss.apply``: logits and loss in tiles."""

    @staticmethod
    def apply(
        fn: Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor],
        module: nn.Module,
        x: torch.Tensor,
        y: torch.Tensor,
        mask: torch.Tensor | None,
        shards: int,
        compute_params: Sequence[nn.Parameter] | None = None,
        output_reduction: Reduction = "mean",
    ) -> torch.Tensor:
        """Return the loss of hidden states x [b, s, d] with targets y [b, s].

        Args:
            fn: ``fn(module, x, y)``, the mean or sum of a tile, as ``output_reduction`` is.
            module: handed to ``fn``.
            x: hidden states.
            y: targets.
            mask: [b, s], true for tokens that count; ``None`` for all.
            shards: number of tiles.
            compute_params: accepted; gradients of parameters arrive once here.
            output_reduction: how losses of tiles are joined: a mean is one over tokens.
        """
        x, y = x.flatten(0, -2), y.flatten()
        if mask is not None:
            x, y = x[mask.flatten().bool()], y[mask.flatten().bool()]
        parts = list(zip(torch.chunk(x, shards), torch.chunk(y, shards), strict=True))

        def tile(own: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            return fn(module, own[None], target[None])

        losses = [checkpoint(tile, *part, use_reentrant=False) for part in parts]
        if output_reduction == "sum":
            return torch.stack(losses).sum()
        shares = [len(own) / len(x) for own, _ in parts]
        return torch.stack([loss * share for loss, share in zip(losses, shares, strict=True)]).sum()


class TiledLoss:
    """``TiledLoss.apply``: the mean loss of logits that are there, in tiles."""

    @staticmethod
    def apply(
        loss_fn: Callable[..., torch.Tensor],
        logits: torch.Tensor,
        vocab_size: int,
        shift_labels: torch.Tensor,
        shards: int,
    ) -> torch.Tensor:
        """Return the mean over all labels that count; 0, with a graph, if none does.

        It is of the same dtype either way, at least float32: ranks add theirs up.

        What the function makes of logits, such as a copy in float32, is in memory for one tile,
        and is made again in backward. Tiles without labels are left out.

        Args:
            loss_fn: as models of Transformers have it: called with ``logits``, ``labels`` (none),
                ``vocab_size`` and ``shift_labels``, it returns the mean over labels that count.
            logits: [b, s, vocabulary].
            vocab_size: handed on.
            shift_labels: [b, s], of the token after each; -100 for those that do not count.
            shards: number of tiles.
        """

        def tile(part: torch.Tensor, labels: torch.Tensor, count: int) -> torch.Tensor:
            found = loss_fn(
                logits=part, labels=None, vocab_size=vocab_size, shift_labels=labels.contiguous()
            )
            return found.to(dtype) * count

        dtype = torch.promote_types(logits.dtype, torch.float32)
        step = -(-shift_labels.shape[1] // shards)
        pairs = zip(*(torch.split(x, step, 1) for x in (logits, shift_labels)), strict=True)
        counted = [(*pair, int((pair[1] != IGNORED).sum())) for pair in pairs]
        total: int = sum(count for *_, count in counted)
        if not total:
            return logits[..., :0].to(dtype).sum()  # of no number, as 0 times infinity is none
        found = [checkpoint(tile, *given, use_reentrant=False) for given in counted if given[2]]
        mean: torch.Tensor = torch.stack(found).sum() / total
        return mean
