"""What a checkpoint holds of an engine: the client's tensors, buffers, and states of plugins.

A parameter that is joined of several of the client's tensors is cut into these here, for saving and
for loading. A plugin that keeps a state and does not register it is refused.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from drivetrain.contracts.state.extra import StateWriter
from drivetrain.contracts.state.fragment import Box, Fragment
from drivetrain.errors import CheckpointError
from drivetrain.tensor_parts import copy_into, tensor_parts

if TYPE_CHECKING:
    from drivetrain.contracts.state.parameters import ParameterInfo, ParameterTable, Placement
    from drivetrain.plan.hub import Hub

PLUGIN = "plugin"
"""Kind of tensors that are a plugin's."""


def plugin_state(hub: Hub, engine: Any) -> StateWriter:
    """The state of all plugins.

    Raises:
        CheckpointError: a plugin has state that would be lost.
    """
    writer = StateWriter()
    hub.save_state(engine, writer)
    saves, loads = (
        {impl.plugin_name for impl in hub.implementations(hook)}
        for hook in ("save_state", "load_state")
    )
    owners = {key.partition("/")[0] for key in writer.keys}
    for name, plugin in hub.plugins.items():
        flaw = None
        if name in saves and name not in owners:
            flaw = f"its save_state stored nothing under {name + '/'!r}"
        elif name in saves ^ loads:
            flaw = "it implements one of save_state and load_state without the other"
        elif hasattr(plugin, "state_dict") and name not in saves:
            flaw = "it has a state_dict, but no hook save_state that stores it"
        if flaw is not None:
            raise CheckpointError(f"state of {hub.label(name)} would be lost: {flaw}")
    return writer


def plugin_fragments(hub: Hub, engine: Any) -> list[Fragment]:
    """Tensors of plugins that are cut over ranks.

    Raises:
        CheckpointError: a name does not begin with the name of a plugin that has such tensors.
    """
    owners = {impl.plugin_name for impl in hub.implementations("state_fragments")}
    found = [replace(fragment, kind=PLUGIN) for fragment in hub.state_fragments(engine)]
    for fragment in found:
        if fragment.name.partition("/")[0] not in owners:
            raise CheckpointError(
                f"a plugin has a state fragment {fragment.name!r}; its name must begin with the "
                f"plugin's and a slash: {' or '.join(sorted(owners))}"
            )
    return found


def client_fragments(
    fragments: Iterable[Fragment], table: ParameterTable, module: nn.Module
) -> list[Fragment]:
    """Fragments of the client's tensors, where parameters are joined of several.

    Args:
        fragments: of a module's parameters and their states.
        table: facts about the parameters.
        module: has them.
    """
    infos = [table.info(parameter) for parameter in module.parameters()]
    joined = {i.name: i.placement.joined for i in infos if i.placement and i.placement.joined}
    found: list[Fragment] = []
    for fragment in fragments:
        start = 0
        for name, length in joined.get(fragment.name, ()):
            found.append(_part_of(fragment, name, start, length))
            start += length
        if fragment.name not in joined:
            found.append(fragment)
    return found


def _part_of(joined: Fragment, name: str, start: int, length: int) -> Fragment:
    """What a fragment has of rows [start, start + length) as a tensor of its own."""
    if not joined.global_shape:  # a count
        return replace(joined, name=name)
    boxes, spans, offset = [], list[tuple[int, int]](), 0
    for box in joined.boxes:
        first, rows = box.global_offset[0], box.size[0]
        low, high = max(first, start), min(first + rows, start + length)
        if low < high:
            place = (low - start, *box.global_offset[1:])
            boxes.append(Box(place, (high - low, *box.size[1:]), offset))
            spans.append((box.local_offset + (low - first) * box.numel // rows, boxes[-1].numel))
            offset += boxes[-1].numel

    def read() -> torch.Tensor:
        flat = joined.read()
        return torch.cat([flat[:0], *(flat[at : at + numel] for at, numel in spans)])

    def write(values: torch.Tensor) -> None:
        flat = joined.read().clone()
        done = 0
        for at, numel in spans:
            flat[at : at + numel] = values[done : done + numel]
            done += numel
        joined.write(flat)

    shape = (length, *joined.global_shape[1:])
    return replace(
        joined, name=name, global_shape=shape, boxes=tuple(boxes), read=read, write=write
    )


def persistent_buffers(
    table: ParameterTable, module: nn.Module, without: Collection[nn.Module] = ()
) -> dict[str, tuple[torch.Tensor, ParameterInfo]]:
    """Name -> buffer and facts of all that belong to the ``state_dict``, in plain tensors.

    Args:
        table: has the facts.
        module: whose ``state_dict`` it is.
        without: parts of the module whose buffers are left out.
    """
    passing = {
        f"{prefix}.{name}" if prefix else name
        for prefix, part in module.named_modules(remove_duplicate=False)
        for name in (part._buffers if part in without else part._non_persistent_buffers_set)
    }
    found: dict[str, tuple[torch.Tensor, ParameterInfo]] = {}
    for path, buffer, info in table.buffers(module):
        if path not in passing:
            parts = tensor_parts(buffer, info.name)
            found |= {name: (part, info) for name, part in parts.items()}
    return found


def buffer_fragment(name: str, buffer: torch.Tensor, placement: Placement) -> Fragment:
    """A buffer that is a part of the client's."""
    return Fragment(
        name=name,
        kind="buffer",
        global_shape=placement.global_shape,
        dtype=buffer.dtype,
        boxes=placement.boxes,
        owner=True,
        home="device",
        read=lambda: buffer.detach().reshape(-1),
        write=lambda values: copy_into(buffer, values.view_as(buffer)),
    )
