"""State beside tensors of parameters: who registers it, and that nobody forgets to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from drivetrain.errors import CheckpointError
from drivetrain.tensor_parts import tensor_parts

if TYPE_CHECKING:
    from drivetrain.fragment import Fragment
    from drivetrain.hub import Hub

PLUGIN = "plugin"
"""Kind of tensors that are a plugin's."""


class StateWriter:
    """Collects plain data (for JSON) and tensors under the name of whoever writes them."""

    def __init__(self) -> None:
        self.data: dict[bool, dict[str, Any]] = {False: {}, True: {}}
        self.tensors: dict[bool, dict[str, torch.Tensor]] = {False: {}, True: {}}

    def put(self, key: str, value: Any, *, per_rank: bool = False) -> None:
        """Store ``value`` under ``key``: the plugin's name, a slash, and what it is.

        Args:
            key: name under which :class:`StateReader` finds it again.
            value: a tensor, or plain data: numbers, strings, booleans, None, lists, dicts.
            per_rank: whether it differs between ranks. Such state comes back only in the layout
                that it was saved in; otherwise rank 0's value comes back everywhere.

        Raises:
            CheckpointError: not plain data, or the key is taken.
        """
        if key in self.keys:
            raise CheckpointError(f"two plugins write checkpoint state under {key!r}")
        if isinstance(value, torch.Tensor):
            self.tensors[per_rank][key] = value
        else:
            self.data[per_rank][key] = plain(value, key)

    @property
    def keys(self) -> set[str]:
        """All keys in use."""
        return {
            key for stores in (self.data, self.tensors) for part in stores.values() for key in part
        }


class StateReader:
    """What :class:`StateWriter` stored, and nothing else."""

    def __init__(self, data: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        self._data = data
        self._tensors = tensors

    def get(self, key: str, default: Any = None) -> Any:
        """The value stored under ``key``."""
        if key in self._tensors:
            return self._tensors[key]
        return self._data.get(key, default)


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


def persistent_buffers(module: nn.Module) -> dict[str, torch.Tensor]:
    """Name -> buffer of all that belong to the module's ``state_dict``, in plain tensors."""
    own = (
        (prefix, name, module._non_persistent_buffers_set)
        for prefix, module in module.named_modules(remove_duplicate=False)
        for name in module._buffers
    )
    passing = {".".join(filter(None, (prefix, n))) for prefix, n, passing in own if n in passing}
    lasting = {name: buffer for name, buffer in module.named_buffers() if name not in passing}
    found: dict[str, torch.Tensor] = {}
    for name, buffer in lasting.items():
        found |= tensor_parts(buffer, name.replace("_orig_mod.", ""))
    return found


def plain(value: Any, what: str) -> Any:
    """``value`` if it survives JSON unchanged, with lists for tuples.

    Raises:
        CheckpointError: it does not; names the first part at fault.
    """
    fault = _first_fault(value, what)
    if fault is not None:
        raise CheckpointError(
            f"{fault} is not plain data (numbers, strings, booleans, None, lists, dicts with "
            "string keys); convert it before saving, e.g. vars(args), tensor.tolist(), str(path)"
        )
    return json.loads(json.dumps(value))


def is_plain(value: Any) -> bool:
    """Whether :func:`plain` takes ``value``."""
    return _first_fault(value, "") is None


def tupled(current: Any, saved: Any) -> Any:
    """``saved`` as a tuple where ``current`` is one; JSON turns tuples (betas) into lists."""
    return tuple(saved) if isinstance(current, tuple) and isinstance(saved, list) else saved


def _first_fault(value: Any, path: str) -> str | None:
    if value is None or isinstance(value, (bool, int, float, str)):
        return None
    if isinstance(value, (list, tuple)):
        faults = (_first_fault(item, f"{path}[{i}]") for i, item in enumerate(value))
    elif isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                return f"key {key!r} of {path}"
        faults = (_first_fault(item, f"{path}.{key}") for key, item in value.items())
    else:
        return f"{path} ({type(value).__name__})"
    return next((fault for fault in faults if fault is not None), None)
