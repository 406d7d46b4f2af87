"""The differentiable function over drivetrain's operators for block-sparse attention."""

from __future__ import annotations

from typing import Any

import torch
from drivetrain_kernels import (
    BlockLists,
    Visibility,
    block_sparse_attention,
    block_sparse_attention_backward,
)
from torch.autograd.function import once_differentiable


class _BlockSparse(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        bias: torch.Tensor | None,
        lists: BlockLists,
        visible: Visibility,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        visible = visible._replace(bias=bias)
        out, lse = block_sparse_attention(query, key, value, *lists[:2], visible)
        ctx.save_for_backward(query, key, value, out, lse, *lists, *visible[:4])
        ctx.rest = visible[4:]
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, for_out: torch.Tensor | None, for_lse: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        query, key, value, out, lse, *others = ctx.saved_tensors
        visible = Visibility(*others[5:], *ctx.rest)
        if for_out is None:
            for_out = torch.zeros_like(out)
        wide = lse.dtype
        delta = (for_out.to(wide) * out.to(wide)).sum(3)
        delta = (delta if for_lse is None else delta - for_lse).contiguous()
        of_query, of_key, of_value, of_bias = block_sparse_attention_backward(
            _dense(for_out.to(query.dtype)), query, key, value, lse, delta,
            BlockLists(*others[:5]), visible, bias_gradient=ctx.needs_input_grad[3],
        )  # fmt: skip
        if not ctx.needs_input_grad[3]:
            return of_query, of_key, of_value, None, None, None
        assert visible.bias is not None
        of_bias = of_bias.reshape(visible.bias.shape).to(visible.bias.dtype)
        return of_query, of_key, of_value, of_bias, None, None


def attend_to_blocks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lists: BlockLists,
    visible: Visibility,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend to listed blocks; gradients reach query, key, value, bias, and come from both results.

    Args:
        query: [b, h, s, d].
        key: [b, h_kv, t, d], h a multiple of h_kv.
        value: [b, h_kv, t, d_v].
        lists: blocks that queries see.
        visible: what else decides. A ``bias`` that requires a gradient has blocks of its own for
            every head, and for every sample that has any.

    Returns:
        The result [b, h, s, d_v], and the logarithms of the sums of exponentials [b, h, s].

    Raises:
        ArgumentError: shapes or dtypes that do not go together.
        RuntimeError: second derivatives are asked for.
    """
    bias = visible.bias
    wants_bias = bias is not None and bias.requires_grad and torch.is_grad_enabled()
    if wants_bias and bias is not None and lists.starts.shape[0] == 1:
        bias = bias.expand(query.shape[0], -1, -1, -1).contiguous()
    tensors = (_dense(query), _dense(key), _dense(value))
    result: tuple[torch.Tensor, torch.Tensor] = _BlockSparse.apply(  # type: ignore[no-untyped-call]
        *tensors, bias, lists, visible._replace(bias=None)
    )
    return result


def _dense(x: torch.Tensor) -> torch.Tensor:
    """With each token's numbers side by side."""
    return x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()
