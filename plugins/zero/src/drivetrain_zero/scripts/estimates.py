"""How much memory model states need: the formulas, as tables and as numbers.

P is the number of parameters, L that of the largest layer (a module's own parameters), in 16 bits
with Adam (arXiv:1910.02054, section 3). All numbers are bytes; those of the host are per node.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from torch import nn

_GIB = 2**30


def estimate_zero2_model_states_mem_needs(
    total_params: int,
    num_gpus_per_node: int = 1,
    num_nodes: int = 1,
    cpu_offload: bool = True,
    additional_buffer_factor: float = 1.5,
) -> tuple[int, int]:
    """Stage 2.

    Returns:
        (bytes of host memory per node, bytes of device memory).
    """
    gpus = num_gpus_per_node * num_nodes
    if cpu_offload:
        host = total_params * max(4 * gpus, 16) * additional_buffer_factor
        return int(host), 2 * total_params
    host = total_params * 4 * num_gpus_per_node * additional_buffer_factor
    return int(host), int(2 * total_params + 18 * total_params / gpus)


def estimate_zero3_model_states_mem_needs(
    total_params: int,
    largest_layer_params: int,
    num_gpus_per_node: int = 1,
    num_nodes: int = 1,
    cpu_offload: bool = True,
    cpu_offload_params: bool = True,
    zero_init: bool = True,
    additional_buffer_factor: float = 1.5,
) -> tuple[int, int, int]:
    """Stage 3.

    Returns:
        (bytes of host memory per node, bytes of device memory, bytes of the largest layer, which
        the second number includes).
    """
    gpus, share = num_gpus_per_node * num_nodes, 1 / num_nodes
    largest = 4 * largest_layer_params
    if cpu_offload:
        per_parameter = (18 if cpu_offload_params else 16) * share
        device = largest + (0.0 if cpu_offload_params else 2 * total_params / gpus)
        factor = per_parameter if zero_init else max(4 * num_gpus_per_node, per_parameter)
        host = total_params * factor
    else:
        device = largest + 18 * total_params / gpus
        host = (largest_layer_params if zero_init else total_params) * 4 * num_gpus_per_node
    return int(host * additional_buffer_factor), int(device), largest


def estimate_zero2_model_states_mem_needs_all_live(
    model: nn.Module,
    num_gpus_per_node: int = 1,
    num_nodes: int = 1,
    additional_buffer_factor: float = 1.5,
) -> None:
    """Write a table of stage 2's needs for ``model`` to the standard output."""
    total, _ = _counts(model)
    estimate_zero2_model_states_mem_needs_all_cold(
        total, num_gpus_per_node, num_nodes, additional_buffer_factor
    )


def estimate_zero2_model_states_mem_needs_all_cold(
    total_params: int,
    num_gpus_per_node: int = 1,
    num_nodes: int = 1,
    additional_buffer_factor: float = 1.5,
) -> None:
    """Write a table of stage 2's needs for so many parameters to the standard output."""
    rows = []
    for offload in (True, False):
        host, device = estimate_zero2_model_states_mem_needs(
            total_params, num_gpus_per_node, num_nodes, offload, additional_buffer_factor
        )
        rows.append((host, device, f"offload_optimizer={_device(offload)}"))
    _write(f"{total_params / 1e6:.0f}M total params", num_nodes, num_gpus_per_node, rows)


def estimate_zero3_model_states_mem_needs_all_live(
    model: nn.Module,
    num_gpus_per_node: int = 1,
    num_nodes: int = 1,
    additional_buffer_factor: float = 1.5,
) -> None:
    """Write a table of stage 3's needs for ``model`` to the standard output."""
    estimate_zero3_model_states_mem_needs_all_cold(
        *_counts(model), num_gpus_per_node, num_nodes, additional_buffer_factor
    )


def estimate_zero3_model_states_mem_needs_all_cold(
    total_params: int,
    largest_layer_params: int,
    num_gpus_per_node: int = 1,
    num_nodes: int = 1,
    additional_buffer_factor: float = 1.5,
) -> None:
    """Write a table of stage 3's needs for so many parameters to the standard output."""
    rows = []
    for offload, offload_params in ((True, True), (True, False), (False, False)):
        for zero_init in (True, False):
            host, device, _ = estimate_zero3_model_states_mem_needs(
                total_params,
                largest_layer_params,
                num_gpus_per_node,
                num_nodes,
                offload,
                offload_params,
                zero_init,
                additional_buffer_factor,
            )
            what = (
                f"offload_param={_device(offload_params)}, "
                f"offload_optimizer={_device(offload)}, zero_init={int(zero_init)}"
            )
            rows.append((host, device, what))
    size = (
        f"{total_params / 1e6:.0f}M total params, "
        f"{largest_layer_params / 1e6:.0f}M largest layer params"
    )
    _write(size, num_nodes, num_gpus_per_node, rows)


def _counts(model: nn.Module) -> tuple[int, int]:
    """Parameters of the model, and of the module that directly has most."""
    own: Callable[[nn.Module], int] = lambda module: sum(  # noqa: E731
        parameter.numel() for parameter in module.parameters(recurse=False)
    )
    return sum(p.numel() for p in model.parameters()), max(map(own, model.modules()))


def _device(offload: bool) -> str:
    return "cpu" if offload else "none"


def _write(size: str, nodes: int, gpus: int, rows: list[tuple[int, int, str]]) -> None:
    lines = [
        "Estimated memory needed for params, optim states and gradients for a:",
        f"HW: Setup with {nodes} node{'s'[: nodes != 1]}, {gpus} GPU{'s'[: gpus != 1]} per node.",
        f"SW: Model with {size}.",
        "  per CPU  |  per GPU |   Options",
        *(
            f"  {host / _GIB:7.2f}GB | {device / _GIB:6.2f}GB | {what}"
            for host, device, what in rows
        ),
    ]
    sys.stdout.write("\n".join(lines) + "\n")
